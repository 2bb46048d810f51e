"""Rows as text, Markdown and HTML."""

from __future__ import annotations

import html
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """Parameters that one method trains in one layer (or in all layers of a type)."""

    method: str
    layer: str
    type: str
    parameters: int


@dataclass
class Table:
    """Rows with a title, as aligned text, Markdown or HTML."""

    title: str
    rows: list[Row]
    columns: tuple[str, ...] = ("method", "layer", "type", "parameters")
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        """The rows as text, a total last."""
        body = [[_text(getattr(row, column)) for column in self.columns] for row in self.rows]
        total = ["total", *[""] * (len(self.columns) - 2), _text(sum(row.parameters for row in self.rows))]
        return [*body, total]

    def __str__(self) -> str:
        lines = [list(self.columns), *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        text = ["  ".join(_pad(cell, widths[i], i, len(widths)) for i, cell in enumerate(line)).rstrip() for line in lines]
        rule = "-" * max(map(len, text))
        return "\n".join([self.title, rule, text[0], rule, *text[1:-1], rule, text[-1], *self.notes])

    def to_markdown(self) -> str:
        """The table as GitHub Markdown."""
        head = f"| {' | '.join(self.columns)} |\n|{' --- |' * (len(self.columns) - 1)} ---: |"
        notes = "".join(f"\n\n{note}" for note in self.notes)
        return "\n".join([head, *(f"| {' | '.join(line)} |" for line in self.cells())]) + notes

    def to_html(self) -> str:
        """The table as HTML, every text escaped."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self.cells())
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        title = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _pad(cell: str, width: int, column: int, columns: int) -> str:
    return cell.rjust(width) if column == columns - 1 else cell.ljust(width)
