"""Rows as aligned text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """Parameters that one method trains in one layer (or in all layers of a type)."""

    method: str
    layer: str
    type: str
    parameters: int


@dataclass
class Table:
    """Rows with a title; the columns are attributes of a row, by default of `Row`, numbers last.

    `summed` says whether the rows are added up.
    """

    title: str
    rows: Sequence[Any]
    columns: tuple[str, ...] = ("method", "layer", "type", "parameters")
    notes: list[str] = field(default_factory=list)
    summed: bool = True

    def cells(self) -> list[list[str]]:
        """The rows as text; a total last, if they are summed."""
        lines = list(map(self._cells_of, self.rows))
        if not self.summed:
            return lines
        total = sum(row.parameters for row in self.rows)
        empty = [""] * (len(self.columns) - 2)
        return [*lines, ["total", *empty, _text(total)]]

    def _cells_of(self, row: Any) -> list[str]:
        return [_text(getattr(row, column)) for column in self.columns]

    def by_type(self, note: str) -> Table:
        """Sum up the rows of each method in layers of one type, which are counted, with a note below."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.method, row.type), []).append(row)
        rows = []
        for (method, kind), members in groups.items():
            places = f"{len(members)} places"
            if len(members) == 1:
                places = members[0].layer
            rows.append(Row(method, places, kind, sum(row.parameters for row in members)))
        return Table(self.title, rows, self.columns, [*self.notes, note])

    def __str__(self) -> str:
        lines = [list(self.columns), *self.cells()]
        widths = [0] * len(self.columns)
        for line in lines:
            widths = list(map(max, widths, map(len, line)))
        head, *body = [_aligned(line, widths) for line in lines]
        rule = "-" * len(head)
        if self.summed:
            body.insert(len(body) - 1, rule)
        else:
            body.append(rule)
        return "\n".join([self.title, rule, head, rule, *body, *self.notes])

    def to_markdown(self) -> str:
        """The table as GitHub Markdown."""
        lines = [_markdown_line(self.columns), "|" + " --- |" * (len(self.columns) - 1) + " ---: |"]
        lines += map(_markdown_line, self.cells())
        for note in self.notes:
            lines += ["", _escaped(note)]
        return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _aligned(cells: list[str], widths: list[int]) -> str:
    """Join cells, the last one at the right of its column."""
    *texts, number = map(str.ljust, cells, widths)
    return "  ".join([*texts, number.strip().rjust(widths[-1])])


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that ends no cell and no line and opens no HTML tag, such as the class name `<lambda>`."""
    return " ".join(text.splitlines()).replace("|", "\\|").replace("<", "&lt;")


def heading(methods: str, model: str, depth: float) -> str:
    """Write what was done to which model, and in which share of its blocks.

    >>> heading("lora", "VisionTransformer", 0.25)
    'lora on VisionTransformer, depth 0.25'
    """
    if depth < 1:
        return f"{methods} on {model}, depth {depth:g}"
    return f"{methods} on {model}"
