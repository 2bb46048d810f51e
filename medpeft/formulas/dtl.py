"""DTL: a side stream of low rank beside the trunk, joined to its last blocks.

Fu, Zhu & Wu, "DTL: Disentangled Transfer Learning for Visual Recognition" (AAAI 2024), arXiv 2312.07856.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_INPUT, cast
from ..adapters.options import Count, Must
from ..adapters.registry import register
from ..architecture.site import Site
from ..errors import MedpeftError
from .beside import HINT, UNMERGEABLE, BesideTrunk, as_wide
from .grid import convolved, find_grid, on_patches
from .whole_weights import factor

_Positive = Annotated[float, Must("be a finite number above 0", lambda x: x > 0)]
_Start = Annotated[float, Must("be a number from 0 to 1", lambda x: 0 <= x <= 1)]


class Depthwise(nn.Module):
    """A 3×3 kernel for every channel, without bias, that all blocks of one width share. It starts as 1."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(channels, 1, *[3] * dims))
        with torch.no_grad():
            self.kernel.flatten(1)[:, 3**dims // 2] = 1  # (C, 1, 3, 3) → (C, 9)

    def forward(self, image: Tensor) -> Tensor:
        """Convolve every channel by itself: (B, H, W, C) → (B, H, W, C)."""
        return convolved(image, self.kernel, groups=len(self.kernel))


@register(
    "dtl",
    hint=HINT,
    unmergeable=UNMERGEABLE,
    search={"rank": (1, 2, 4, 8), "start": (0.5, 0.75, 1.0)},
)
class DTL(BesideTrunk):
    """A stream h beside the trunk: h + B·A·x before every block, and y + h·σ(β·h) after the last ones.

    h is zero at first and B starts at zero. Before the first of those joins x is taken without gradient, so
    backward does not go through the blocks that lie before it. Where the trunk gets wider, the new channels
    of h are zero; where its grid shrinks, h is averaged.

    Args:
        site: A block of the trunk.
        rank: Rows of A, r.
        beta: β, the steepness of the sigmoid.
        start: Share of the blocks before the first join, M / L. With 1 the only join is after the last block,
            and the trunk has no backward at all.
        convolve: DTL+: a 3×3 kernel for every channel, shared by all blocks, on what is joined; tokens before
            the patches pass it by.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 2,
        beta: _Positive = 100.0,
        start: _Start = 0.5,
        convolve: bool = False,
    ) -> None:
        super().__init__(site)
        first_join = min(round(start * self.blocks), self.blocks - 1)
        self.beta, self.joins = float(beta), self.index >= first_join
        self.is_before_joins = self.index <= first_join
        self.down = factor(site, rank, self.layout.inputs)
        self.up = nn.Parameter(torch.zeros(self.layout.inputs, rank))
        if not self.joins:
            self.acts_on = ON_INPUT
        elif convolve:
            width, dims = self.layout.outputs, self.layout.dims
            self.shared["kernel"] = site.share((width, dims), lambda: Depthwise(width, dims))

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Compute h + B·A·x, hand it on, and return `x` unchanged."""
        seen = x
        if self.is_before_joins:
            seen = x.detach()
        tokens = self.channels_last(cast(seen, self.down), self.layout.inputs)
        h = F.linear(F.linear(tokens, self.down), self.up)
        if self.index > 0:
            h = h + self._following(self.handed(self.index - 1), h)
        self.hand_on(h)
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + h·σ(β·h)."""
        tokens = self.channels_last(y, self.layout.outputs)
        h = self._following(self.handed(self.index), tokens)
        change = F.silu(self.beta * h) / self.beta
        if "kernel" in self.shared:
            change = self._convolved(change)
        return y + self.as_in_block(change).to(y.dtype)

    def _following(self, h: Tensor, tokens: Tensor) -> Tensor:
        return as_wide(self.following(h, tokens.shape[1:-1]), tokens.shape[-1])

    def _convolved(self, change: Tensor) -> Tensor:
        """Convolve the patches: (B, N, C) → (B, N, C), or (B, H, W, C) → (B, H, W, C)."""
        kernel = self.shared["kernel"]
        if change.ndim > 3:
            convolved: Tensor = kernel(change)
            return convolved
        grid = find_grid(self.layout, change.shape[1])
        if grid is None:
            raise MedpeftError(
                f"{self.method!r} finds no grid in the {change.shape[1]} tokens of {self.name}: use images "
                "as high as they are wide, or convolve=False."
            )
        return on_patches(change, grid, kernel)
