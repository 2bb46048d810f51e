"""Convpass: a convolution over the grid of tokens, in a bottleneck beside every attention and every MLP.

Jie & Deng, "Convolutional Bypasses Are Better Vision Transformer Adapters" (2022), arXiv 2207.07039, Sec. 3.2
and Fig. 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace
from ..adapters.handover import Handover
from ..adapters.options import Count, Factor, Probability
from ..adapters.registry import register
from ..architecture.blocks import Branch, Branches, branches
from ..architecture.network import Network
from ..architecture.site import Partner, Site, Unfit
from ..architecture.windows import around_windows, cuts_windows, reorders_tokens
from ..errors import MedpeftError
from .grid import Grid, convolved, filtered, find_grid, on_patches
from .two_matrices import TwoMatrices


@register(
    "convpass",
    hint="it adapts transformer blocks with an attention, a norm and an MLP. Try 'conv_adapter' or 'tsa'.",
    search={
        "scale": (0.01, 0.1, 1.0, 10.0, 100.0),
        "bottleneck": (4, 8, 16),
        "init": ("identity", "xavier"),
    },
    unmergeable="there are two nonlinearities beside the layer, which none of its weights can replace",
    older={"windows": "inside"},
)
class Convpass(Adapter, TwoMatrices):
    """A convolution over the tokens beside every attention and MLP: y + s·up(act(conv(act(down(x))))).

    x is the input of the attention or the MLP, (B, …, D), after the norm. The tokens of the patches are
    convolved as the image that they came from, 3 × 3 (3 × 3 × 3 in volumes); class and register tokens each
    as an image of one pixel.

    Where a block cuts windows out of its tokens for the attention, x is what the attention gets before that,
    and y what it gives after the windows are put together again. The adapter is then on the block.

    Args:
        site: The attention or the MLP of a transformer block, or a block that cuts windows. The partners of
            that are where x enters and where the sum leaves.
        bottleneck: Channels of the convolution, h.
        scale: s.
        dropout: Probability before `up`.
        init: Start of the convolution: "identity", so that it passes on what it gets, or "xavier", drawn.
    """

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: Count = 8,
        scale: Factor = 1.0,
        dropout: Probability = 0.1,
        init: Literal["identity", "xavier"] = "identity",
    ) -> None:
        super().__init__(site)
        assert site.layout is not None
        self.name, self.layout, self.scale = site.name, site.layout, float(scale)
        self.add_down(self.layout.inputs, bottleneck)
        self.conv = nn.Parameter(torch.zeros(bottleneck, bottleneck, *[3] * self.layout.dims))
        self.conv_bias = nn.Parameter(torch.zeros(bottleneck))
        self.add_up(bottleneck, self.layout.outputs)
        nn.init.xavier_uniform_(self.down, generator=site.generator)
        if init == "xavier":
            nn.init.xavier_uniform_(self.conv, generator=site.generator)
        else:
            nn.init.eye_(self._centre.detach())
        self.dropout = nn.Dropout(dropout)
        self.is_beside_windows = bool(site.partners)
        if self.is_beside_windows:
            self.handover = Handover()

    @classmethod
    def sites(
        cls,
        network: Network,
        *,
        targeted: bool = False,
        beside: Literal["both", "attention"] = "both",
        windows: Literal["around", "inside"] = "around",
    ) -> Iterator[Site | Unfit]:
        """Yield the attentions and MLPs of blocks; beside="attention" leaves out the MLPs (Convpass-attn).

        With windows="inside" the convolution stays within each window.
        """
        for block in branches(network):
            for branch in block.branches:
                if beside == "attention" and not branch.attention:
                    continue
                if reorders_tokens(block.name, network.modules):
                    yield Unfit(branch.name, "gets tokens in windows, and not in the order of the image")
                elif branch.half:
                    yield Unfit(
                        branch.name,
                        "is the second half of an MLP, and what enters the first does not reach it",
                    )
                elif windows == "around" and cuts_windows(block, branch):
                    yield _site_around(block, branch)
                else:
                    yield Site(branch.name, branch.module, "", "", layout=branch.layout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s·up(act(conv(act(down(x))))); beside windows the partners have added it already."""
        if not self.is_beside_windows:
            return self.added(x, y)
        if self.handover.take_once() is not None:
            raise MedpeftError(
                f"{self.method!r} found no place in {self.name} to add to what its attention gives: "
                "exclude it, or try 'adaptformer'."
            )
        return y

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s·up(act(conv(act(down(x))))), where act(x) = x·sigmoid(1.702·x)."""
        axis = self.layout.axis
        hidden = _act(self.narrow(x, axis))
        hidden = self.dropout(_act(self._convolved(hidden)))
        change = self.scale * self.widen(hidden, axis)
        if y.ndim == 3 and y.shape[1] < change.shape[1]:
            # A class attention gives the class token alone, which comes first.
            change = change[:, : y.shape[1]]
        if change.numel() != y.numel():
            raise MedpeftError(
                f"{self.method!r} adds to every token that enters, and {self.name} makes {tuple(y.shape)} of "
                f"{tuple(x.shape)}: it pools. Exclude it, or try 'adaptformer' or 'lora'."
            )
        return y + change.reshape(y.shape).to(y.dtype)  # such as (B, H, W, D) → (B, H·W, D)

    @property
    def _centre(self) -> Tensor:
        """The middle of the kernel, (h, h)."""
        return self.conv.flatten(2)[..., 3**self.layout.dims // 2]  # (h, h, 3, …, 3) → (h, h, 9 or 27)

    def _convolved(self, hidden: Tensor) -> Tensor:
        """Convolve (B, …, h), tokens on a grid or in a row; or the tokens of one image, (N, h)."""
        return filtered(hidden, self.layout, self._on_grid, self._in_row)

    def _in_row(self, hidden: Tensor) -> Tensor:
        """Convolve the patches, and apart from them every other token: (B, N, h) → (B, N, h)."""
        return on_patches(hidden, self._find_grid(hidden.shape[1]), self._on_grid, self._alone)

    def _on_grid(self, image: Tensor) -> Tensor:
        """Convolve an image, (B, H, W, h)."""
        return convolved(image, self.conv, self.conv_bias)

    def _alone(self, hidden: Tensor) -> Tensor:
        """Convolve tokens, each as an image of one pixel: all of the kernel but its centre meets padding."""
        return F.linear(hidden, self._centre, self.conv_bias)

    def _find_grid(self, tokens: int) -> Grid:
        """Find the grid of the patches among so many tokens; it has no sizes if none of them is a patch."""
        grid = find_grid(self.layout, tokens)
        if grid is not None:
            return grid
        expected = self.layout.prefix + self.layout.added
        shape = "square" if self.layout.dims == 2 else "cube"
        raise MedpeftError(
            f"{self.method!r} finds no grid in the {tokens} tokens of {self.name}: {expected} and a {shape} "
            "of patches were expected. Use an image as high as it is wide, exclude the layer, "
            "or try 'adaptformer', which needs no grid."
        )


class Before(SecondPlace):
    """Place before windows are cut: the norm whose output the attention gets."""

    first: Convpass

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Leave `y` for the place after the windows, and return it unchanged."""
        self.first.handover.leave(y)
        return y


class BeforeBlock(SecondPlace):
    """Place before windows are cut, in a block without a norm there: the block itself."""

    first: Convpass

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Leave `x` for the place after the windows, and return it unchanged."""
        self.first.handover.leave(x)
        return x


class After(SecondPlace):
    """Place after windows are put together: the module whose input is what the attention gives."""

    first: Convpass

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Add the convolution of what the attention got. Of several calls in a block, the first counts."""
        entered = self.first.handover.take_once()
        if entered is None:
            return x
        return self.first.added(entered, x)


def _site_around(block: Branches, attention: Branch) -> Site | Unfit:
    """A windowed attention as a whole: the block, with the places before and after its windows."""
    around = around_windows(block)
    if around is None:
        return Unfit(
            attention.name,
            "gets windows of its block's tokens, and where those are whole is not known there. With "
            "windows='inside' the convolution stays within each window",
        )
    make: type[SecondPlace] = BeforeBlock
    if around.before:
        make = Before
    before = block.module.get_submodule(around.before)
    after = block.module.get_submodule(around.after)
    return Site(
        block.name,
        block.module,
        "",
        "",
        layout=attention.layout,
        partners=(
            Partner(Site(f"{block.name}.{around.before}".rstrip("."), before, "", ""), make),
            Partner(Site(f"{block.name}.{around.after}", after, "", ""), After),
        ),
    )


def _act(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)
