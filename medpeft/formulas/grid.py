"""The tokens of a block: their channels, and the grid of an image's patches among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..architecture.convolution import CONVOLVE
from ..architecture.site import Layout
from ..errors import require


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


def require_channels(tokens: Tensor, channels: int, what: str, others: str) -> None:
    """Raise `MedpeftError` if a block has another number of channels than its layers say.

    Args:
        tokens: What enters or leaves it, (B, …, C).
        channels: The number that its layers say.
        what: Which method cannot do what with which block.
        others: Methods to try in its place.
    """
    seen = tokens.shape[-1]
    require(
        seen == channels,
        f"{what}, where there are {seen} channels and not {channels}, as its layers say: exclude it, or try "
        f"{others}.",
    )


def filtered(
    tokens: Tensor,
    layout: Layout,
    on_image: Callable[[Tensor], Tensor],
    in_row: Callable[[Tensor], Tensor],
) -> Tensor:
    """Filter the tokens of a block, (B, …, C), on a grid or in a row; or those of one image, (N, C).

    Args:
        tokens: Their channels are last.
        layout: Of the block.
        on_image: Filters tokens on a grid, (B, H, W, C).
        in_row: Filters tokens in a row, (B, N, C).
    """
    if tokens.ndim > 3:
        return on_image(tokens)
    if tokens.ndim == 2:
        return in_row(tokens[None])[0]  # (N, C) → (1, N, C) and back
    if layout.sequence == 0:
        return in_row(tokens.transpose(0, 1)).transpose(0, 1)  # (N, B, C) → (B, N, C) and back
    return in_row(tokens)


def on_patches(
    tokens: Tensor,
    grid: Grid,
    on_image: Callable[[Tensor], Tensor],
    alone: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Filter the patches of tokens in a row, (B, N, C), as the image (B, H, W, C) that they make.

    The tokens before them stay, or go through `alone`.
    """
    before = tokens[:, : grid.prefix]
    if alone is not None:
        before = alone(before)
    if not grid.sizes:
        return before
    image = tokens[:, grid.prefix :].unflatten(1, grid.sizes)  # (B, H·W, C) → (B, H, W, C)
    patches = on_image(image).flatten(1, -2)  # (B, H, W, C) → (B, H·W, C)
    return torch.cat([before, patches], 1)


def convolved(image: Tensor, kernel: Tensor, bias: Tensor | None = None, groups: int = 1) -> Tensor:
    """Convolve an image, (B, H, W, C), by a kernel of odd sides, so that its size stays."""
    convolve = CONVOLVE[kernel.ndim - 2]
    channels_first = image.movedim(-1, 1)  # (B, H, W, C) → (B, C, H, W)
    return convolve(channels_first, kernel, bias, padding=kernel.shape[-1] // 2, groups=groups).movedim(1, -1)
