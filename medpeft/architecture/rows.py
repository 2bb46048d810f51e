"""Channels of some parts of a fused projection.

They are taken out of its weight, put back into it, or changed in its output.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Output channels of one part of a fused projection: `view(groups, total)[:, start:start + size]`."""

    part: str
    start: int
    size: int
    groups: int = 1

    def indices(self, channels: int) -> list[int]:
        """The part's output channels, of `channels` in all."""
        total = channels // self.groups
        return [g * total + self.start + i for g in range(self.groups) for i in range(self.size)]


def part_sizes(rows: tuple[Rows, ...], channels: int) -> list[int]:
    """Channels of each part; of the whole layer, `channels`, where there are no parts."""
    return [row.size * row.groups for row in rows] or [channels]


def take_rows(weight: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    """The rows of the parts, one part after the other; all of `weight` where there are no parts."""
    return weight[_indices(weight, rows)] if rows else weight


def replace_rows(weight: Tensor, rows: tuple[Rows, ...], new: Tensor) -> Tensor:
    """`weight` with `new`, which has the rows of the parts one after the other, in their places."""
    if not rows:
        return new
    return weight.to(new.dtype).index_copy(0, _indices(weight, rows), new)


def place_channels(change: Tensor, rows: tuple[Rows, ...], y: Tensor, axis: int, fill: float = 0.0) -> Tensor:
    """The parts' channels of `change` at their places among those of `y`, `fill` elsewhere."""
    if not rows:
        return change
    out = torch.full_like(y, fill)
    for row, part in zip(rows, change.split(part_sizes(rows, 0), axis), strict=True):
        there = out.unflatten(axis, (row.groups, -1)).narrow(
            axis if axis < 0 else axis + 1, row.start, row.size
        )
        there.copy_(part.unflatten(axis, (row.groups, -1)))
    return out


def _indices(weight: Tensor, rows: tuple[Rows, ...]) -> Tensor:
    return torch.tensor([i for row in rows for i in row.indices(len(weight))], device=weight.device)
