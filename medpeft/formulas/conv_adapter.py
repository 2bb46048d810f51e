"""Conv-Adapter: a depthwise-separable bottleneck beside the convolutions of residual blocks.

Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets" (CVPR Workshop
2024), arXiv 2208.07463, Eq. 3.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace, cast
from ..adapters.handover import Handover
from ..adapters.options import Count
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.residual import (
    activation_of,
    after,
    before,
    block_around,
    downsamples,
    ends,
    is_inverted,
)
from ..architecture.site import Partner, Site
from ..errors import MedpeftError


@register(
    "conv_adapter",
    hint="it adapts convolutions of residual blocks wider than 1×1. Try 'adaptformer' or 'convpass'.",
    search={"reduction": (1, 2, 4, 8), "form": ("parallel", "sequential")},
    unmergeable=(
        "there is a nonlinearity between the two convolutions of its bottleneck, "
        "which no weight of the layer can replace"
    ),
    older={"place": "convolution", "activation": "relu"},
)
class ConvAdapter(Adapter):
    """A separable bottleneck beside the convolutions of residual blocks: y + α ⊙ up(act(down(x))).

    x is (B, I, …), the convolution's input, and y its output after the norm and the activation that follow.
    In a block that normalises first, x is what the norm before the convolution is given, and y the
    convolution's own output, as in ConvNeXt's. Of an inverted residual block, x and y are the input and the
    output. `down` is a depthwise-separable convolution of I to
    I / γ channels in I / γ groups. It slides as the adapted convolution does, so that both see the same
    field. `up` is a 1×1 convolution. α has one value per channel and starts at 1.

    Args:
        site: A convolution, or an inverted residual block. The partners of a convolution are its block, and
            the norm before it or the norm or activation after which the sum is taken.
        reduction: γ. If it does not divide I, the next smaller width that does is taken.
        form: "parallel" beside the convolution, "sequential" after it, on y.
        activation: "backbone" for the activation of the block around it, or "relu".
    """

    def __init__(
        self,
        site: Site,
        *,
        reduction: Count = 4,
        form: Literal["parallel", "sequential"] = "parallel",
        activation: Literal["backbone", "relu"] = "backbone",
    ) -> None:
        super().__init__(site)
        self.name, self.form = site.name, form
        self.geometry, inputs, outputs = _beside(site)
        if form == "sequential":
            self.geometry, inputs = _keeping_size(self.geometry), outputs
        width = _width(inputs, reduction)
        self.down = nn.Parameter(torch.empty(width, inputs // width, *self.geometry.kernel))
        self.up = nn.Parameter(torch.zeros(outputs, width))
        self.scale = nn.Parameter(torch.ones(outputs))
        self.act: nn.Module = nn.ReLU()
        if activation == "backbone" and site.draft.activation is not None:
            self.act = _like(site.draft.activation)
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=site.generator)
        makers = [partner.make for partner in site.partners]
        self.starts_earlier, self.adds_later = Before in makers, Finished in makers
        # Opened by the block, not by the convolution: its place is `Around`.
        self.entered = Handover()

    @classmethod
    def sites(
        cls,
        network: Network,
        *,
        targeted: bool = False,
        place: Literal["authors", "convolution"] = "authors",
    ) -> Iterator[Site]:
        """Yield the convolutions of residual blocks wider than 1×1; with a target, any convolution.

        With place="authors" they come with the places where the sum is taken, inverted residual blocks as a
        whole, and the convolutions between the stages of ConvNeXt too.
        """
        modules = network.modules
        around: set[str] = set()
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS):
                continue
            block = block_around(site.name, modules)
            activation = activation_of(modules[block]) or activation_of(network.model)
            site = replace(site, draft=replace(site.draft, activation=activation))
            is_of_body = in_body(site.name, modules)
            if place == "authors" and is_of_body and is_inverted(modules[block]):
                if block not in around:
                    around.add(block)
                    yield Site(block, modules[block], "", "", draft=site.draft)
                continue
            is_between = place == "authors" and downsamples(site.name, modules)
            is_wide = site.host[0, 0].numel() > 1
            if not targeted and not (is_wide and (is_of_body or is_between)):
                continue
            if place == "authors" and is_of_body:
                site = _site_in(block, site, network)
            yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + α ⊙ up(act(down(x))); where y is not finished yet, leave x for the place that is."""
        if self.adds_later:
            self.entered.leave(x)
            return y
        if self.starts_earlier:
            x = self._before_norm(x)
        return self.added(x, y)

    def _before_norm(self, x: Tensor) -> Tensor:
        """Take what the norm before the convolution, whose input is `x`, was given.

        Raises:
            MedpeftError: there was no such norm, or it was given something of another form, such as tokens.
        """
        entered: Tensor | None = self.entered.take_once()
        if entered is None:
            raise MedpeftError(
                f"{self.method!r} found no norm before {self.name} to start from: use place='convolution', "
                "or exclude it."
            )
        axis = self.geometry.channel_axis
        if entered.ndim != x.ndim or entered.shape[axis] != x.shape[axis]:
            raise MedpeftError(
                f"{self.method!r} starts before the norm of {self.name}, which was given "
                f"{tuple(entered.shape)} where the convolution takes {tuple(x.shape)}: use "
                "place='convolution', or exclude it."
            )
        return entered

    def added(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + α ⊙ up(act(down(x))), or of y where the form is sequential."""
        source = x
        if self.form == "sequential":
            source = y
        hidden = self.act(self.geometry.convolve(cast(source, self.down), self.down, groups=len(self.down)))
        change = self.geometry.pointwise(hidden, self.scale[:, None] * self.up, strided=False)
        if change.shape != y.shape:
            raise MedpeftError(
                f"{self.method!r} makes {tuple(change.shape)} beside {self.name}, which makes "
                f"{tuple(y.shape)}: use place='convolution', or exclude it."
            )
        return y + change.to(y.dtype)


class Around(SecondPlace):
    """The block around the convolution: what the convolution leaves is taken before the block ends."""

    first: ConvAdapter

    def __init__(self, site: Site, first: ConvAdapter) -> None:
        super().__init__(site, first)
        self.handover = first.entered

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y`, unless the sum was never taken."""
        if self.handover.take_once() is None:
            return y
        raise MedpeftError(
            f"{self.method!r} found nothing after {self.first.name} to add to: use place='convolution', "
            "or exclude it."
        )


class Before(SecondPlace):
    """The norm before the convolution, in a block that normalises first. Its input is the adapter's x."""

    first: ConvAdapter

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Leave `x` for the adapter of the convolution, and return it unchanged."""
        self.first.entered.leave(x)
        return x


class Finished(SecondPlace):
    """The norm or activation after the convolution. Where a block calls it again, the first call counts."""

    first: ConvAdapter

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the bottleneck to the finished output of the convolution."""
        entered = self.first.entered.take_once()
        if entered is None:
            return y
        return self.first.added(entered, y)


def _site_in(block: str, site: Site, network: Network) -> Site:
    """A convolution of a residual block, with the norm before it or the place where y is finished."""
    modules = network.modules
    norm, last = before(site.name, block, modules), after(site.name, block, modules)
    second = last or norm
    if not second:
        return site
    around = Partner(Site(block, modules[block], "", ""), Around)
    make = Finished if last else Before
    return replace(site, partners=(around, Partner(Site(second, modules[second], "", ""), make)))


def _beside(site: Site) -> tuple[Geometry, int, int]:
    """The geometry of what the adapter is beside, and the channels that enter and leave it."""
    if site.kind != "block":
        geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # its sites are convolutions
        outputs, inputs = site.host.shape[:2]
        return geometry, inputs * geometry.groups, outputs
    block = ends(site.layer)
    kernel = tuple(block.first.kernel_size)
    ones = (1,) * len(kernel)
    padding = tuple((size - 1) // 2 for size in kernel)
    geometry = Geometry(kernel, block.stride, ones, padding, padding, groups=1, mode="zeros")
    return geometry, block.first.in_channels, block.last.out_channels


def _like(activation: nn.Module) -> nn.Module:
    """Copy an activation without the hooks on it, and without its writing into its input."""
    alike: Any = copy.copy(activation)
    nn.Module.__init__(alike)
    if hasattr(alike, "inplace"):
        alike.inplace = False
    return alike  # type: ignore[no-any-return]  # typed as Any to set `inplace`


def _keeping_size(geometry: Geometry) -> Geometry:
    """Make the geometry of a convolution with the same kernel that goes step by step and keeps the size."""
    ones = (1,) * geometry.dims
    before = tuple((size - 1) // 2 for size in geometry.kernel)
    after = tuple(size // 2 for size in geometry.kernel)
    return replace(geometry, stride=ones, dilation=ones, before=before, after=after)


def _width(inputs: int, reduction: int) -> int:
    """Width of the bottleneck: `inputs` over the reduction, or the next smaller divisor of `inputs`."""
    width = max(inputs // reduction, 1)
    while inputs % width:
        width -= 1
    return width
