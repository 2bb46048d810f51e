"""TSA: a 1×1 convolution beside every convolution.

Li, Liu & Bilen, "Cross-domain Few-shot Learning with Task-specific Adapters" (CVPR 2022), arXiv 2107.00358,
Eq. 5 and 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, along, cast
from ..adapters.in_place import in_place, writes_fresh_output
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import MedpeftError

Form = Literal["matrix", "vector", "series"]


@register(
    "tsa",
    hint="it adapts convolutions (without a target, those of residual blocks). Try 'lora' or 'ssf'.",
    search={"init": ("zero", "eye"), "sites": ("body", "all")},
    by_image=True,
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

    def __init__(
        self, site: Site, *, form: Form = "matrix", init: Literal["zero", "eye"] = "zero", dense: bool = False
    ) -> None:
        super().__init__(site)
        self.geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # its sites are convolutions
        self.name, self.form, self.dense = site.name, form, dense and self.geometry.groups > 1
        outputs, inputs = site.host.shape[:2]
        self.alpha = nn.Parameter(torch.zeros(self._shape_of_alpha(outputs, inputs)))
        if init == "eye":
            self._start_at_identity(1e-4)
        self.bias: nn.Parameter | None = None
        if form == "series":
            self.bias = nn.Parameter(torch.zeros(outputs))
        # Beside a 1×1 convolution, one convolution with W + α costs less than two.
        beside_1x1 = form == "matrix" and set(self.geometry.kernel) == {1} and not self.dense
        if beside_1x1 and self.geometry.centre is not None:
            self.acts_on = ON_WEIGHT
        self.fresh = writes_fresh_output(site.layer)

    def _shape_of_alpha(self, outputs: int, inputs: int) -> tuple[int, ...]:
        match self.form:
            case "vector":
                return (outputs,)
            case "series":
                return (outputs, outputs)
        if self.dense:
            return (outputs, inputs * self.geometry.groups)
        return (outputs, inputs)

    @torch.no_grad()
    def _start_at_identity(self, size: float) -> None:
        """Set α to `size` where an output channel meets its own input channel; a series stays at zero."""
        if self.form == "vector":
            self.alpha.fill_(size)
        if self.form == "matrix":
            self.alpha.add_(size * _eye(self.alpha, self._groups))

    @property
    def _groups(self) -> int:
        """Groups of channels in α."""
        if self.dense:
            return 1
        return self.geometry.groups

    @classmethod
    def sites(
        cls,
        network: Network,
        *,
        targeted: bool = False,
        sites: Literal["body", "3x3", "all"] = "body",
        form: Form = "matrix",
    ) -> Iterator[Site]:
        """Yield the convolutions of residual blocks ("body"), the 3×3 of them ("3x3"), or all."""
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS) or not fits_beside(site.layer, form):
                continue
            anywhere = targeted or sites == "all"
            if not anywhere and not in_body(site.name, network.modules):
                continue
            if sites != "3x3" or set(site.layer.kernel_size) == {3}:
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + α∗x, or y + A·y + b in a series, (N, O, …)."""
        change = self._change(x, y).to(y.dtype)
        if change.shape != y.shape:
            raise MedpeftError(
                f"{self.method!r} adds a 1×1 convolution to {self.name}, which makes {tuple(y.shape)} of "
                f"{tuple(x.shape)}, and a 1×1 one makes {tuple(change.shape)}: exclude it, or use "
                "form='series'."
            )
        if self.form == "matrix" and self.fresh and in_place(y):
            return y.add_(change)
        return y + change

    def _change(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute α∗x, or A·y + b in a series."""
        channel_axis = self.geometry.channel_axis
        if self.form == "vector":
            seen = self.geometry.subsample(cast(x, self.alpha))
            return seen * along(self.alpha, seen, channel_axis)
        if self.form == "matrix":
            return self.geometry.pointwise(cast(x, self.alpha), self.alpha, self._groups)
        change = self.geometry.pointwise(cast(y, self.alpha), self.alpha, strided=False)
        if self.bias is not None:
            change = change + along(self.bias, change, channel_axis)
        return change

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
