"""Convpass: a convolution over the grid of tokens, in a bottleneck beside every attention and every MLP.

Jie & Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters" (2022), arXiv 2207.07039, Sec. 3.2 and Fig. 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.registry import register
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.site import Site, Unfit
from ..errors import MedpeftError, require_choice, require_positive

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@register(
    "convpass",
    hint="it adapts transformer blocks with an attention, a norm and an MLP. Try 'conv_adapter' or 'tsa'.",
    search={"scale": (0.01, 0.1, 1.0, 10.0, 100.0), "bottleneck": (4, 8, 16)},
    unmergeable="there are two nonlinearities beside the layer, which none of its weights can replace",
)
class Convpass(Adapter):
    """A convolution over the tokens beside every attention and MLP: y + s·up(act(conv(act(down(x))))).

    x is what enters the attention or the MLP, (B, …, D), after the norm. The tokens of the patches are convolved as the image
    that they came from, 3 × 3 (3 × 3 × 3 in volumes); class and register tokens each as an image of one pixel.

    Args:
        site: The attention or the MLP of a transformer block.
        bottleneck: Channels of the convolution, h.
        scale: s.
        dropout: Probability before `up`.
    """

    def __init__(self, site: Site, *, bottleneck: int = 8, scale: float = 1.0, dropout: float = 0.1) -> None:
        super().__init__(site)
        require_positive("bottleneck", bottleneck)
        assert site.layout is not None
        self.name, self.layout, self.scale = site.name, site.layout, float(scale)
        self.down = nn.Parameter(torch.empty(bottleneck, self.layout.inputs))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.conv = nn.Parameter(torch.zeros(bottleneck, bottleneck, *[3] * self.layout.dims))
        self.conv_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(self.layout.outputs, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(self.layout.outputs))
        nn.init.xavier_uniform_(self.down, generator=site.generator)
        nn.init.eye_(self._centre.detach())  # In the authors' code too, where it passes on what `down` gives.
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, beside: str = "both") -> Iterator[Site | Unfit]:
        """Every attention and MLP of the transformer blocks, or the attentions alone (beside="attention", Convpass-attn)."""
        require_choice("beside", beside, ("both", "attention"))
        for block in branches(network):
            for branch in block.branches:
                if branch.attention or beside == "both":
                    if branch.half:
                        yield Unfit(branch.name, "is the second half of an MLP, and what enters the first does not reach it")
                    else:
                        yield Site(branch.name, branch.module, "", "", layout=branch.layout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s·up(act(conv(act(down(x))))), act being x·sigmoid(1.702·x)."""
        axis = self.layout.axis
        hidden = _act(F.linear(cast(x, self.down).movedim(axis, -1), self.down, self.down_bias))
        hidden = self.dropout(_act(self._convolved(hidden)))
        change = self.scale * F.linear(hidden, self.up, self.up_bias).movedim(-1, axis)
        if y.ndim == 3 and y.shape[1] < change.shape[1]:
            change = change[:, : y.shape[1]]  # A class attention gives the class token alone, which comes first.
        if change.numel() != y.numel():
            raise MedpeftError(
                f"{self.method!r} adds to every token that enters, and {self.name} makes {tuple(y.shape)} of {tuple(x.shape)}: "
                "it pools. Exclude it, or try 'adaptformer' or 'lora'."
            )
        return y + change.reshape(y.shape).to(y.dtype)

    @property
    def _centre(self) -> Tensor:
        return self.conv.flatten(2)[..., 3**self.layout.dims // 2]

    def _convolved(self, hidden: Tensor) -> Tensor:
        """The convolution of (B, …, h), tokens in a row or on a grid."""
        if hidden.ndim > 3:
            return self._on_grid(hidden)
        hidden = hidden.transpose(0, 1) if self.layout.sequence == 0 else hidden
        prefix, grid = self._layout_of(hidden.shape[1])
        # Of a kernel on an image of one pixel, all but the centre sees padding.
        alone = F.linear(hidden[:, :prefix], self._centre, self.conv_bias)
        image = hidden[:, prefix:].unflatten(1, grid) if grid else hidden[:, prefix:]
        found = torch.cat([alone, self._on_grid(image).flatten(1, -2) if grid else image], 1)
        return found.transpose(0, 1) if self.layout.sequence == 0 else found

    def _on_grid(self, image: Tensor) -> Tensor:
        convolve = _CONVOLVE[self.layout.dims]
        return convolve(image.movedim(-1, 1), self.conv, self.conv_bias, padding=1).movedim(1, -1)

    def _layout_of(self, tokens: int) -> tuple[int, tuple[int, ...]]:
        """How many tokens come before the grid, and the grid; empty where all do."""
        known = self.layout.prefix + self.layout.added
        if tokens <= known:
            return tokens, ()
        side = round(max(tokens - known, 0) ** (1 / self.layout.dims))
        # CaiT, whose grid is known, adds its class token in its last blocks only.
        for prefix, grid in (
            (known, self.layout.grid),
            (self.layout.added, self.layout.grid),
            (known, (side,) * self.layout.dims),
        ):
            if len(grid) == self.layout.dims and math.prod(grid) == tokens - prefix:
                return prefix, grid
        raise MedpeftError(
            f"{self.method!r} finds no grid in the {tokens} tokens of {self.name}: {known} and a "
            f"{'square' if self.layout.dims == 2 else 'cube'} of patches were expected. Use an image as high as it is wide, "
            "exclude the layer, or try 'adaptformer', which needs no grid."
        )


def _act(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
