"""TSA: a 1×1 convolution beside every convolution.

Li, Liu & Bilen, "Cross-domain Few-shot Learning with Task-specific Adapters" (CVPR 2022), arXiv 2107.00358,
Eq. 5 and 6.
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
        form: "matrix" (α is (O, I / G), grouped like its host), "vector" (α is (O,), each channel onto
            itself, for O = I), or "series" (y + A·y + b after the convolution, where A is (O, O)).
        init: "zero", or "eye" for the official 1e-4·I; a series is the identity at either.
        dense: Let α of a grouped host mix all I channels; merging would make the host's weight dense, so it
            is refused.
    """

    def __init__(self, site: Site, *, form: str = "matrix", init: str = "zero", dense: bool = False) -> None:
        super().__init__(site)
        require_choice("init", init, ("zero", "eye"))
        self.geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # its sites are convolutions
        self.form, self.dense = form, dense and self.geometry.groups > 1
        outputs, inputs = site.host.shape[:2]
        self.alpha = nn.Parameter(self._initial_alpha(outputs, inputs, init, dense))
        self.bias = nn.Parameter(torch.zeros(outputs)) if form == "series" else None
        # Beside a 1×1 convolution, one convolution with W + α costs less than two.
        beside_1x1 = form == "matrix" and set(self.geometry.kernel) == {1} and not self.dense
        if beside_1x1 and self.geometry.centre is not None:
            self.acts_on = ON_WEIGHT
        self.fresh = writes_fresh_output(site.layer)

    def _initial_alpha(self, outputs: int, inputs: int, init: str, dense: bool) -> Tensor:
        """Zeros, or the official 1e-4 where an output channel meets its own input channel."""
        small = 1e-4 if init == "eye" else 0.0
        match self.form:
            case "vector":
                return torch.full((outputs,), small)
            case "series":
                return torch.zeros(outputs, outputs)
        groups = 1 if dense else self.geometry.groups
        columns = inputs * self.geometry.groups if dense else inputs
        return small * _eye(torch.zeros(outputs, columns), groups)

    @classmethod
    def sites(
        cls, network: Network, *, targeted: bool = False, sites: str = "body", form: str = "matrix"
    ) -> Iterator[Site]:
        """Yield the convolutions of residual blocks without shortcuts ("body"), only the 3×3 ones, or all."""
        require_choice("sites", sites, ("body", "3x3", "all"))
        require_choice("form", form, ("matrix", "vector", "series"))
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS) or not fits_beside(site.layer, form):
                continue
            in_scope = targeted or sites == "all" or in_body(site.name, network.modules)
            if in_scope and (sites != "3x3" or set(site.layer.kernel_size) == {3}):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + α∗x, or y + A·y + b in a series, (N, O, …)."""
        if self.form == "vector":
            seen = self.geometry.subsample(cast(x, self.alpha))
            return y + (seen * self._per_channel(self.alpha)).to(y.dtype)
        if self.form == "series":
            change = self.geometry.pointwise(cast(y, self.alpha), self.alpha, strided=False)
            if self.bias is not None:
                change = change + self._per_channel(self.bias)
            return y + change.to(y.dtype)
        groups = 1 if self.dense else self.geometry.groups
        change = self.geometry.pointwise(cast(x, self.alpha), self.alpha, groups).to(y.dtype)
        if self.fresh and in_place(y):
            return y.add_(change)
        return y + change

    def _per_channel(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * self.geometry.dims)  # (C,) → (C, 1, …)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Add α to W at the tap that sees what α sees; in a series, W + A·W and b + A·b + shift."""
        assert weight is not None
        if self.form == "series":
            return self._merged_series(weight, bias)
        if self.dense:
            raise MedpeftError("a dense α does not fit into a grouped convolution's weight")
        alpha: Tensor = self.alpha
        if self.form == "vector":
            first_tap = weight.flatten(2)[..., 0]  # (O, I / G, k, …) → (O, I / G)
            alpha = alpha[:, None] * _eye(first_tap, self.geometry.groups).to(alpha)
        return weight + self.geometry.spread(alpha), bias

    def _merged_series(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.geometry.groups > 1:
            raise MedpeftError("a series mixes what a grouped convolution's weight keeps apart")
        matrix = weight.flatten(1).to(self.alpha.dtype)  # (O, I, k, …) → (O, I·k·…)
        merged_weight = weight + (self.alpha @ matrix).view_as(weight)
        if bias is None:
            return merged_weight, self.bias
        merged_bias = bias + self.alpha @ bias.to(self.alpha.dtype)
        if self.bias is not None:
            merged_bias = merged_bias + self.bias
        return merged_weight, merged_bias


def _eye(like: Tensor, groups: int) -> Tensor:
    """Make a matrix (O, I / groups) with a one where output and input channel have the same number."""
    outputs, columns = like.shape
    rows = torch.arange(outputs, device=like.device)
    group = rows // (outputs // groups)
    column = rows - group * columns
    return (column[:, None] == torch.arange(columns, device=like.device)).to(like.dtype)


def fits_beside(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, form: str) -> bool:
    """Whether a 1×1 convolution beside the layer, or after it in a series, gives an output of its size."""
    if form == "series":
        return True
    if form == "vector" and layer.in_channels != layer.out_channels:
        return False
    return Geometry.of(layer).same_size_as_1x1
