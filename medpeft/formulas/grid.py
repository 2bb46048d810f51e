"""The grid of an image's patches among the tokens of a block."""

from __future__ import annotations

import math
from typing import NamedTuple

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
