"""Residual adapters: a 1×1 convolution beside or after the convolutions of residual blocks.

Rebuffi, Bilen & Vedaldi, "Learning multiple visual domains with residual adapters" (NeurIPS 2017), arXiv 1705.08045, Sec. 3.2,
in series; "Efficient parametrization of multi-domain deep neural networks" (CVPR 2018), arXiv 1803.10082, Sec. 3, in parallel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import MedpeftError, require_choice


@register(
    "residual_adapter",
    hint="it adapts the 3×3 convolutions of residual blocks. Try 'houlsby' or 'lora'.",
    search={"form": ("parallel", "series")},
)
class ResidualAdapter(Adapter):
    """A 1×1 convolution α beside or after the 3×3 convolutions of residual blocks: conv(x) + α∗x, or y + α∗y.

    The papers give each domain its own BatchNorms as well: join it with "bn" for those.

    Args:
        site: A convolution of I to O channels in G groups.
        form: "parallel", α being (O, I / G) and grouped like its host, or "series", α being (O, O).
    """

    def __init__(self, site: Site, *, form: str = "parallel") -> None:
        super().__init__(site)
        self.geometry, self.form = Geometry.of(site.layer), form  # type: ignore[arg-type]  # its sites are convolutions
        outputs, inputs = site.host.shape[:2]
        self.alpha = nn.Parameter(torch.zeros(outputs, inputs if form == "parallel" else outputs))

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, form: str = "parallel") -> Iterator[Site]:
        """3×3 convolutions (3×3×3 in volumes) of residual blocks; with a target, any convolution that a 1×1 fits beside."""
        require_choice("form", form, ("parallel", "series"))
        for site in network.sites("conv"):
            if isinstance(site.layer, CONVS) and (form == "series" or Geometry.of(site.layer).same_size_as_1x1):
                body = set(site.layer.kernel_size) == {3} and in_body(site.name, network.modules)
                if targeted or body:
                    yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """conv(x) + α∗x at the stride of the convolution, or y + α∗y, (B, O, …)."""
        if self.form == "series":
            return y + self.geometry.pointwise(cast(y, self.alpha), self.alpha, strided=False).to(y.dtype)
        return y + self.geometry.pointwise(cast(x, self.alpha), self.alpha, self.geometry.groups).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W with α added at the tap that sees what α sees; in series (I + α)·W and (I + α)·b."""
        assert weight is not None
        if self.form == "parallel":
            return weight + self.geometry.spread(self.alpha), bias
        if self.geometry.groups > 1:
            raise MedpeftError("a series mixes what a grouped convolution's weight keeps apart")
        mixed = weight + (self.alpha @ weight.flatten(1).to(self.alpha.dtype)).view_as(weight)
        return mixed, None if bias is None else bias + self.alpha @ bias.to(self.alpha.dtype)
