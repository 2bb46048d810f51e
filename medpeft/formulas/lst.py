"""LST: a ladder of small blocks beside the trunk, which takes what every block gives.

Sung, Cho & Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning" (NeurIPS
2022), arXiv 2206.06522, Sec. 3. The ladder is added to the output of the last block, before the norm and the
head: the model is then the base at first. In the authors' code it takes that output's place.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_OUTPUT, cast
from ..adapters.options import Count, Probability
from ..adapters.registry import register
from ..architecture.convolution import CONVOLVE
from ..architecture.site import Layout, Site
from ..architecture.trunk import (
    Convolution,
    TransformerBody,
    convolution_body,
    has_attention,
    transformer_body,
)
from .beside import HINT, UNMERGEABLE, BesideTrunk

_TEMPERATURE = 0.1


class Matrix(nn.Module):
    """A linear map with a bias, drawn Kaiming-uniform, or zero at first."""

    def __init__(
        self, inputs: int, outputs: int, generator: torch.Generator | None, *, zero: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        if not zero:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        """Compute W·x + b over the last axis."""
        return F.linear(x, self.weight, self.bias)


class SideTransformer(nn.Module):
    """A transformer block of small width: g + attn(norm(g)), then g + mlp(norm(g)), on (B, …, d).

    In a grid of tokens attention is within windows, as in the trunk; they are not shifted, since what the
    trunk gives is mixed across them already.
    """

    def __init__(
        self, width: int, body: TransformerBody, reduction: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        heads = max(1, body.heads // reduction)
        self.heads, self.window = math.gcd(heads, width), body.window
        hidden = _reduced(body.hidden, reduction)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = Matrix(width, 3 * width, generator), Matrix(width, width, generator)
        self.fc1, self.fc2 = Matrix(width, hidden, generator), Matrix(hidden, width, generator)

    def forward(self, g: Tensor) -> Tensor:
        """Run the block."""
        g = g + self._attended(self.norm1(g))
        change: Tensor = self.fc2(F.gelu(self.fc1(self.norm2(g))))
        return g + change

    def _attended(self, g: Tensor) -> Tensor:
        """Attend over all tokens, or within windows of a grid: (B, …, d) → (B, …, d)."""
        if g.ndim == 3:
            return self._among(g)
        if self.window == 0 or max(g.shape[1:-1]) <= self.window:
            return self._among(g.flatten(1, -2)).view_as(g)  # (B, H, W, d) → (B, H·W, d) and back
        return self._in_windows(g)

    def _in_windows(self, g: Tensor) -> Tensor:
        """Attend within windows; a grid that they do not fill is padded with zeros."""
        sizes, axes = g.shape[1:-1], g.ndim - 2
        padding = [0, 0]
        for size in reversed(sizes):
            padding += [0, -size % self.window]
        padded = F.pad(g, padding)
        cut = padded
        for axis in range(axes):
            cut = cut.unflatten(1 + 2 * axis, (-1, self.window))  # (B, H, W, d) → (B, h, n, w, n, d)
        counts, windows = range(1, 2 * axes, 2), range(2, 2 * axes + 1, 2)
        order = [0, *counts, *windows, 2 * axes + 1]
        by_window = cut.permute(order)  # (B, h, n, w, n, d) → (B, h, w, n, n, d)
        tokens = by_window.flatten(1 + axes, -2).flatten(0, axes)  # (B, h, w, n, n, d) → (B·h·w, n·n, d)
        back = sorted(range(len(order)), key=order.__getitem__)
        whole = (
            self._among(tokens).view(by_window.shape).permute(back)
        )  # (B·h·w, n·n, d) → (B, h, n, w, n, d)
        whole = whole.reshape(padded.shape)  # (B, h, n, w, n, d) → (B, H, W, d)
        for axis, size in enumerate(sizes, 1):
            whole = whole.narrow(axis, 0, size)
        return whole

    def _among(self, tokens: Tensor) -> Tensor:
        """Attend over all tokens of each row, (B, N, d)."""
        parts = self.qkv(tokens).unflatten(-1, (3, self.heads, -1))  # (B, N, 3·d) → (B, N, 3, H, d / H)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, N, 3, H, d / H) → 3 × (B, H, N, d / H)
        attended = F.scaled_dot_product_attention(q, k, v)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))  # (B, H, N, d / H) → (B, N, d)
        return mixed


class SideConvolutions(nn.Module):
    """A residual block of few channels, g + convolutions(norm(g)) on (B, …, d), after the trunk's own."""

    def __init__(
        self, width: int, body: list[Convolution], reduction: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.groups: list[int] = []
        inputs = width
        for convolution in body:
            outputs = _reduced(convolution.outputs, reduction)
            if convolution is body[-1]:
                outputs = width
            groups = math.gcd(convolution.groups, inputs, outputs)
            if convolution.groups == convolution.inputs == convolution.outputs:
                groups = outputs = inputs
            kernel = [size - 1 + size % 2 for size in convolution.kernel]  # Odd, so that the image stays.
            weight = nn.Parameter(torch.empty(outputs, inputs // groups, *kernel))
            nn.init.kaiming_uniform_(weight, a=5**0.5, generator=generator)
            self.weights.append(weight)
            self.biases.append(nn.Parameter(torch.zeros(outputs)))
            self.groups.append(groups)
            inputs = outputs

    def forward(self, g: Tensor) -> Tensor:
        """Run the block; a ReLU follows every convolution but the last."""
        image: Tensor = self.norm(g).movedim(-1, 1)  # (B, H, W, d) → (B, d, H, W)
        for i, groups in enumerate(self.groups):
            weight = self.weights[i]
            padding = [size // 2 for size in weight.shape[2:]]
            convolve = CONVOLVE[weight.ndim - 2]
            image = convolve(image, weight, self.biases[i], padding=padding, groups=groups)
            if i < len(self.groups) - 1:
                image = image.relu()
        return g + image.movedim(1, -1)  # (B, d, H, W) → (B, H, W, d)


@register("lst", hint=HINT, unmergeable=UNMERGEABLE, search={"reduction": (2, 4, 8, 16)})
class LST(BesideTrunk):
    """A ladder beside the trunk: g ← S(μ·g + (1 − μ)·Down(y)) for every block, and y + Up(norm(g)) at last.

    y is what the block gives, without gradient; g starts as Down of what enters the first block. S is a block
    of the trunk's kind at a fraction of its width, and μ = σ(α / 0.1) with a trained α. Nothing of the trunk
    has a backward. Where the trunk changes its width or its grid, g goes through a matrix, and is averaged.

    Args:
        site: A block of the trunk. Those that a target or an exclusion leaves out have no part in it.
        reduction: The trunk's width by the ladder's, r.
        join: "add" adds Up(norm(g)), which starts at zero, to what the last block gives; "replace" puts it in
            its place, as the authors do.
        dropout: Probability before Up.
    """

    def __init__(
        self,
        site: Site,
        *,
        reduction: Count = 8,
        join: Literal["add", "replace"] = "add",
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__(site)
        width = _reduced(self.layout.outputs, reduction)
        self.change: Matrix | None = None  # From the width of the block before, where that differs.
        if self.index == 0:
            self.first = Matrix(self.layout.inputs, width, site.generator)
        else:
            self.acts_on = ON_OUTPUT  # Only the first block begins the ladder, at its input.
            before = site.draft.together[self.index - 1].layout
            self._add_change(before, width, reduction, site)
        self.down = Matrix(self.layout.outputs, width, site.generator)
        self.gate = nn.Parameter(torch.zeros(()))
        self.side = _side(site, width, reduction)
        self.adds = join == "add"
        if self.is_last:
            self.norm = nn.LayerNorm(width)
            self.dropout = nn.Dropout(dropout)
            self.up = Matrix(width, self.layout.outputs, site.generator, zero=self.adds)

    def _add_change(self, before: Layout | None, width: int, reduction: int, site: Site) -> None:
        """Create the matrix from the width of the block before to that of this one, where they differ."""
        assert before is not None
        width_before = _reduced(before.outputs, reduction)
        if width_before != width:
            self.change = Matrix(width_before, width, site.generator)

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Begin the ladder with Down of what enters the first block, and return `x` unchanged."""
        self.hand_on(self.first(self._taken(x, self.layout.inputs)))
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Climb one step, and return `y`; after the last block add the ladder to it."""
        step = self.down(self._taken(y, self.layout.outputs))
        before = max(self.index - 1, 0)  # The first block takes what its own `enter` has left.
        g = self.following(self.handed(before), step.shape[1:-1])
        if self.change is not None:
            g = self.change(g)
        share = torch.sigmoid(self.gate / _TEMPERATURE)
        g = self.side(share * g + (1 - share) * step)
        if not self.is_last:
            self.hand_on(g)
            return y
        change = self.as_in_block(self.up(self.dropout(self.norm(g)))).to(y.dtype)
        if self.adds:
            return y + change
        return change

    def _taken(self, x: Tensor, channels: int) -> Tensor:
        """What the trunk computes, without gradient, as (B, …, D)."""
        return self.channels_last(cast(x.detach(), self.gate), channels)


def _side(site: Site, width: int, reduction: int) -> SideTransformer | SideConvolutions:
    """Make the ladder's block beside one of the trunk's."""
    assert site.layout is not None
    if has_attention(site.layer):
        return SideTransformer(width, transformer_body(site.layer, site.layout), reduction, site.generator)
    return SideConvolutions(width, convolution_body(site.layer), reduction, site.generator)


def _reduced(channels: int, reduction: int) -> int:
    """A fraction of a number of channels, at least one."""
    return max(1, channels // reduction)
