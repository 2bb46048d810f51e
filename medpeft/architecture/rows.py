"""Parts of a fused projection: their rows in its weight, and their channels in its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Output channels of one part of a fused projection: `view(groups, total)[:, start:start + size]`.

    Attributes:
        part: Letter of the part: q, k, v or o.
        start: First channel of the part in each group.
        size: Channels of the part in each group.
        groups: Groups of channels, each with all of the parts; heads, where every head has its own q, k and
            v.
    """

    part: str
    start: int
    size: int
    groups: int = 1

    @property
    def count(self) -> int:
        """Channels of the part in all groups."""
        return self.size * self.groups

    def indices(self, channels: int) -> list[int]:
        """List the part's output channels, of `channels` in all."""
        total = channels // self.groups
        indices: list[int] = []
        for group in range(self.groups):
            first = group * total + self.start
            indices += range(first, first + self.size)
        return indices


class EvenRows(NamedTuple):
    """Parts of one size at even distances, each in one group of channels.

    Attributes:
        start: First channel of the first part.
        distance: Channels from the first of one part to the first of the next.
        size: Channels of a part.
        number: How many parts there are.
    """

    start: int
    distance: int
    size: int
    number: int


def evenly_spaced(rows: tuple[Rows, ...]) -> EvenRows | None:
    """Describe two or more parts by their distance; None where they are of several sizes or distances."""
    if len(rows) < 2:
        return None
    distance = rows[1].start - rows[0].start
    for i, row in enumerate(rows):
        is_even = row.start == rows[0].start + i * distance and row.size == rows[0].size and row.groups == 1
        if not is_even:
            return None
    return EvenRows(rows[0].start, distance, rows[0].size, len(rows))


def part_sizes(rows: tuple[Rows, ...], channels: int) -> list[int]:
    """Count the channels of each part; `channels`, those of the whole layer, where there are no parts."""
    if not rows:
        return [channels]
    return [part.count for part in rows]


def take_rows(weight: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    """Take the rows of the parts, one part after the other; all of `weight` where there are no parts."""
    if not rows:
        return weight
    taken = []
    for part in rows:
        grouped = weight.unflatten(0, (part.groups, -1))  # (O, …) → (groups, O / groups, …)
        taken.append(grouped.narrow(1, part.start, part.size).flatten(0, 1))  # (groups, size, …) → (count, …)
    return torch.cat(taken)


def replace_rows(weight: Tensor, rows: tuple[Rows, ...], new: Tensor) -> Tensor:
    """Copy `weight` with other rows for the parts; `new` has them one part after the other."""
    if not rows:
        return new
    places = take_rows(torch.arange(len(weight), device=weight.device), rows)
    return weight.to(new.dtype).index_copy(0, places, new)


def place_channels(values: Tensor, rows: tuple[Rows, ...], y: Tensor, axis: int, fill: float = 0.0) -> Tensor:
    """Spread the channels of the parts to where they are in `y`.

    Args:
        values: The channels of the parts on `axis`, one part after the other.
        rows: The parts; without any, `values` are returned.
        y: An output of the layer, whose shape is wanted.
        axis: Axis of the channels.
        fill: Value of all other channels.
    """
    if not rows:
        return values
    # Made of the values, not of `y`: mapped by functorch these may be many where `y` is one.
    spread = values.new_full(y.shape, fill, dtype=y.dtype)
    inner = axis
    if axis >= 0:
        inner = axis + 1  # Unflattened, the axis is two, of which the second counts the channels of a group.
    for part, of_part in zip(rows, values.split(part_sizes(rows, 0), axis), strict=True):
        grouped = spread.unflatten(axis, (part.groups, -1))  # (…, C, …) → (…, groups, C / groups, …)
        place = grouped.narrow(inner, part.start, part.size)
        place.copy_(of_part.unflatten(axis, (part.groups, -1)))
    return spread
