"""Conv-Adapter: a depthwise-separable bottleneck beside the convolutions of residual blocks.

Chen et al., "Conv-Adapter: Exploring Parameter Efficient Transfer Learning for ConvNets" (CVPR Workshop
2024), arXiv 2208.07463, Eq. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.options import Count
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.site import Site


@register(
    "conv_adapter",
    hint="it adapts convolutions of residual blocks wider than 1×1. Try 'adaptformer' or 'convpass'.",
    search={"reduction": (1, 2, 4, 8), "form": ("parallel", "sequential")},
    unmergeable=(
        "there is a nonlinearity between the two convolutions of its bottleneck, "
        "which no weight of the layer can replace"
    ),
)
class ConvAdapter(Adapter):
    """A separable bottleneck beside the convolutions of residual blocks: conv(x) + α ⊙ up(relu(down(x))).

    x is (B, I, …). `down` is a depthwise-separable convolution of I to I / γ channels in I / γ groups. It
    slides as the adapted convolution does, so that both see the same field. `up` is a 1×1 convolution. α has
    one value per channel and starts at 1.

    Args:
        site: A convolution.
        reduction: γ. If it does not divide I, the next smaller width that does is taken.
        form: "parallel" beside the convolution, "sequential" after it, on its output.
    """

    def __init__(
        self,
        site: Site,
        *,
        reduction: Count = 4,
        form: Literal["parallel", "sequential"] = "parallel",
    ) -> None:
        super().__init__(site)
        self.form = form
        geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # its sites are convolutions
        outputs = site.host.shape[0]
        if form == "parallel":
            inputs = site.host.shape[1] * geometry.groups
            self.geometry = geometry
        else:
            inputs = outputs
            self.geometry = _keeping_size(geometry)
        width = _width(inputs, reduction)
        self.down = nn.Parameter(torch.empty(width, inputs // width, *geometry.kernel))
        self.up = nn.Parameter(torch.zeros(outputs, width))
        self.scale = nn.Parameter(torch.ones(outputs))
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=site.generator)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield the convolutions of residual blocks wider than 1×1; with a target, any convolution."""
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS):
                continue
            is_wide = max(site.layer.kernel_size) > 1
            if targeted or (is_wide and in_body(site.name, network.modules)):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + α ⊙ up(relu(down(x))), or of y where the form is sequential."""
        source = x
        if self.form == "sequential":
            source = y
        hidden = self.geometry.convolve(cast(source, self.down), self.down, groups=len(self.down)).relu()
        change = self.geometry.pointwise(hidden, self.scale[:, None] * self.up, strided=False)
        return y + change.to(y.dtype)


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
