"""The grid of an image's patches among the tokens of a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..architecture.site import Layout


class Grid(NamedTuple):
    """Position of an image's patches among the tokens: the number of tokens before them, and their grid."""

    prefix: int
    sizes: tuple[int, ...]


def find_grid(layout: Layout, tokens: int) -> Grid | None:
    """Find the grid of the patches among so many tokens; without sizes if none is a patch, None if unknown.

    >>> find_grid(Layout(8, 8, prefix=1), 17)
    Grid(prefix=1, sizes=(4, 4))
    """
    expected = layout.prefix + layout.added
    if tokens <= expected:
        return Grid(tokens, ())
    side = round((tokens - expected) ** (1 / layout.dims))
    candidates = (
        Grid(expected, layout.grid),
        # CaiT, whose grid is known, adds its class token in its last blocks only.
        Grid(layout.added, layout.grid),
        Grid(expected, (side,) * layout.dims),
    )
    for grid in candidates:
        if len(grid.sizes) == layout.dims and math.prod(grid.sizes) == tokens - grid.prefix:
            return grid
    return None


def on_patches(tokens: Tensor, grid: Grid, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the patches as the image (B, H, W, C) that they make; the tokens before them stay: (B, N, C)."""
    if not grid.sizes:
        return tokens
    image = tokens[:, grid.prefix :].unflatten(1, grid.sizes)  # (B, H·W, C) → (B, H, W, C)
    patches = change(image).flatten(1, -2)  # (B, H, W, C) → (B, H·W, C)
    return torch.cat([tokens[:, : grid.prefix], patches], 1)
