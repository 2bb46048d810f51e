"""TSA: a 1×1 convolution beside every convolution.

Li, Liu & Bilen, "Cross-domain Few-shot Learning with Task-specific Adapters" (CVPR 2022), arXiv 2107.00358, Eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.kernels import in_place, writes_fresh_output
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import MedpeftError, require_choice


@register(
    "tsa",
    hint="it adapts convolutions (without a target, those of residual blocks). Try 'lora' or 'ssf'.",
    search={"init": ("zero", "eye"), "sites": ("body", "all")},
)
class TSA(Adapter):
    """A task-specific 1×1 convolution beside every convolution of the residual blocks: conv(x) + α∗x.

    Args:
        site: A convolution of I to O channels in G groups.
        form: "matrix" (α is (O, I / G), grouped like its host), "vector" (α is (O,), each channel onto itself, for O = I),
            or "series" (y + A·y + b after the convolution, A being (O, O)).
        init: "zero", or "eye" for the official 1e-4·I; a series is the identity at either.
        dense: Let α of a grouped host mix all I channels; merging then makes the host's weight dense, so it is refused.
    """

    def __init__(self, site: Site, *, form: str = "matrix", init: str = "zero", dense: bool = False) -> None:
        super().__init__(site)
        require_choice("init", init, ("zero", "eye"))
        self.geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # its sites are convolutions
        self.form, self.dense = form, dense and self.geometry.groups > 1
        outputs, inputs = site.host.shape[0], site.host.shape[1]
        groups = self.geometry.groups
        columns = {"matrix": inputs * (groups if dense else 1), "series": outputs, "vector": 1}[form]
        alpha = torch.zeros(outputs, columns)
        if init == "eye" and form != "series":
            alpha += 1e-4 * (torch.ones(outputs, 1) if form == "vector" else _eye(alpha, 1 if dense else groups))
        self.alpha = nn.Parameter(alpha[:, 0].clone() if form == "vector" else alpha)
        self.bias = nn.Parameter(torch.zeros(outputs)) if form == "series" else None
        # Beside a 1×1 convolution, one convolution with W + α costs less than two.
        beside = form == "matrix" and set(self.geometry.kernel) == {1} and not self.dense
        if beside and self.geometry.centre is not None:
            self.acts_on = ON_WEIGHT
        self.fresh = writes_fresh_output(site.layer)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, sites: str = "body", form: str = "matrix") -> Iterator[Site]:
        """Convolutions of residual blocks but stem and downsample ("body"), the 3×3 of them ("3x3"), or all."""
        require_choice("sites", sites, ("body", "3x3", "all"))
        require_choice("form", form, ("matrix", "vector", "series"))
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS) or not _fits(site.layer, form):
                continue
            wanted = targeted or sites == "all" or in_body(site.name, network.modules)
            if wanted and (sites != "3x3" or set(site.layer.kernel_size) == {3}):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the 1×1 convolution of `x`, or of `y` in a series, (N, O, …)."""
        if self.form == "vector":
            return y + (self.geometry.subsample(cast(x, self.alpha)) * self._per_channel(self.alpha)).to(y.dtype)
        if self.bias is not None:
            mixed = self.geometry.pointwise(cast(y, self.alpha), self.alpha, strided=False)
            return y + (mixed + self._per_channel(self.bias)).to(y.dtype)
        groups = 1 if self.dense else self.geometry.groups
        change = self.geometry.pointwise(cast(x, self.alpha), self.alpha, groups).to(y.dtype)
        return y.add_(change) if self.fresh and in_place(y) else y + change

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * self.geometry.dims)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W with α added at the tap that sees what α sees; (I + A)·W and (I + A)·b + shift for a series."""
        assert weight is not None
        if self.bias is not None:
            if self.geometry.groups > 1:
                raise MedpeftError("a series mixes what a grouped convolution's weight keeps apart")
            mix = self.alpha + torch.eye(len(self.alpha), dtype=self.alpha.dtype, device=self.alpha.device)
            shift = self.bias if bias is None else mix @ bias.to(mix.dtype) + self.bias
            return (mix @ weight.flatten(1).to(mix.dtype)).view_as(weight), shift
        if self.dense:
            raise MedpeftError("a dense α does not fit into a grouped convolution's weight")
        return weight + self.geometry.spread(self._matrix(weight)), bias

    def _matrix(self, weight: Tensor) -> Tensor:
        if self.form == "matrix":
            return self.alpha
        return self.alpha[:, None] * _eye(weight.flatten(2)[..., 0], self.geometry.groups).to(self.alpha)


def _eye(like: Tensor, groups: int) -> Tensor:
    """(O, I / groups) with a one where an output channel meets the input channel of the same number."""
    outputs, columns = like.shape
    rows = torch.arange(outputs, device=like.device)
    group = rows // (outputs // groups)
    column = rows - group * columns
    return (column[:, None] == torch.arange(columns, device=like.device)).to(like.dtype)


def _fits(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, form: str) -> bool:
    if form == "series":
        return True
    same_channels = form == "matrix" or layer.in_channels == layer.out_channels
    return same_channels and Geometry.of(layer).same_size_as_1x1
