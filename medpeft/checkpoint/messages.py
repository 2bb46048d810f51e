"""Text from a file as a message may show it: short, and without control characters."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LINES = 12
"""Lines of the longest listing in a message."""


def printable(text: str) -> str:
    """Replace the control characters by which a file could write to a terminal."""
    shown = []
    for character in text:
        if character.isprintable() or character == "\n":
            shown.append(character)
        else:
            shown.append("\N{REPLACEMENT CHARACTER}")
    return "".join(shown)


def clip(value: object, most: int = 240) -> str:
    """Show a value by its first characters."""
    text = str(value)
    if len(text) > most:
        text = text[:most] + "…"
    return printable(text)


def as_lines(lines: Sequence[str]) -> str:
    """Show each line below the one before, indented; the first `MAX_LINES` and how many more there are."""
    shown = [clip(line) for line in lines[:MAX_LINES]]
    if len(lines) > MAX_LINES:
        shown.append(f"... and {len(lines) - MAX_LINES} more")
    return "\n  ".join(shown)
