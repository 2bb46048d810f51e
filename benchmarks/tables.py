"""Rows of figures as Markdown and JSON."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out rows of text as a Markdown table: the first column to the left, the others to the right."""
    table = f"| {' | '.join(columns)} |\n|---|{'--:|' * (len(columns) - 1)}"
    for row in rows:
        table += f"\n| {' | '.join(row)} |"
    return table


def spread(row: dict[str, Any]) -> str:
    """Write the smallest and the largest ratio of a row."""
    low, high = row["ratio_range"]
    return f"{low:.2f}–{high:.2f}"


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write a file, if the flags name one."""
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
