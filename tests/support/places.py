"""Where things stand in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS, EXAMPLES = ROOT / "tests", ROOT / "examples"

IMPORTABLE = f"{TESTS}:{TESTS / 'support'}:{ROOT}"
"""PYTHONPATH of a process that imports what tests import."""
