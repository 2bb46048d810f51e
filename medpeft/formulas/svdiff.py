"""SV-Diff: a shift of every weight's singular values.

Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning" (ICCV 2023), arXiv 2303.11305, Eq. 2
and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..adapters.adapter import ON_WEIGHT, FlexibleAdapter, along, cast
from ..adapters.in_place import eager, writes_fresh_output
from ..adapters.options import Factor
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.network import Network
from ..architecture.site import Site
from .svd import decompose

Form = Literal["weight", "output", "compute"]

# Positions for which the form in inference is chosen: 16 × 16, a usual number of tokens.
_POSITIONS = 256


class _Marks(NamedTuple):
    """What tells weights apart: their sum and their norm."""

    total: float
    norm: float


class _Comparison(NamedTuple):
    """The weight that was compared last, by its place and version in memory, and the verdict."""

    pointer: int
    version: int
    is_decomposed: bool


@register(
    "svdiff",
    hint="it shifts the singular values of linear and convolution weights. Try 'ssf' or 'bias'.",
    search={"scale": (0.1, 1.0, 10.0), "norms": (False, True)},
)
class SVDiff(FlexibleAdapter):
    """Shift of every weight's singular values: W + U·diag(relu(σ + s·δ) − σ)·Vᵀ, which is exactly W at δ = 0.

    W is taken as (out, −1), the vector of a norm as (1, D); the decomposition is done in float32 or wider.

    Args:
        site: A linear, convolution, embedding or norm layer.
        scale: s.
        keep_svd: Keep U, σ and V in the checkpoint; else they are computed anew when it is loaded.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, site: Site, *, scale: Factor = 1.0, keep_svd: bool = False) -> None:
        super().__init__(site)
        left, values, right = decompose(_as_matrix(site.host))
        self.delta = nn.Parameter(torch.zeros_like(values))
        self.scale = scale
        self.register_buffer("left", left.contiguous(), persistent=keep_svd)
        self.register_buffer("values", values.contiguous(), persistent=keep_svd)
        self.register_buffer("right", right.contiguous(), persistent=keep_svd)
        # By these it notices that the weight is no longer the one that was decomposed.
        self.marks = _marks(site.host)
        self.compared = _Comparison(0, 0, is_decomposed=False)
        self.geometry: Geometry | None = None
        if site.kind == "conv":
            self.geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # by its kind
        # A weight that a parent reads leaves no choice, and U and V as layers know no groups.
        ungrouped = self.geometry is not None and self.geometry.groups == 1
        plain = not site.readers and writes_fresh_output(site.layer)
        self.chooses = plain and (site.kind == "linear" or ungrouped)
        self.acts_on = ON_WEIGHT

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, norms: bool = False) -> Iterator[Site]:
        """Yield linear layers and convolutions; norms on request; embeddings where a target picks them."""
        kinds = ["linear", "conv", "transposed"]
        if norms:
            kinds.append("norm")
        if targeted:
            kinds.append("embedding")
        for site in network.sites(*kinds):
            if site.has_weight:
                yield site

    def form(self, x: Tensor, weight: Tensor | None) -> Form:
        """Choose the form with the fewest operations: U and V as two layers, or a weight built of them.

        Without gradients U·diag(…)·Vᵀ comes on top of W, so that nothing but the shift is rounded.
        """
        if not self.chooses:
            return "weight"
        if not torch.is_grad_enabled() or torch._C._is_tracing():
            return self._form_in_inference()
        return self._form_in_training(x, weight)

    def _form_in_inference(self) -> Form:
        """Choose by the layer alone, so that an image gives the same in a batch of any size."""
        outputs, columns = len(self.left), self.right.shape[1]
        if _POSITIONS * (outputs + columns) < outputs * columns:
            return "output"
        return "weight"

    def _form_in_training(self, x: Tensor, weight: Tensor | None) -> Form:
        outputs, columns, rank = len(self.left), self.right.shape[1], len(self.values)
        positions = self._positions(x)
        # The weight's own gradient comes on top, and its product with U.
        built = (3 * positions + 2 * rank) * outputs * columns
        factors = 2 * positions * rank * (outputs + columns)
        # A built weight's gradient needs x, which a convolution's neighbours keep anyway. The factors keep
        # Vᵀ·x.
        margin = 1.0
        if self.geometry is not None:
            margin = 1.25
        if margin * factors < built and self._stands_for(weight, x):
            return "compute"
        if 2 * positions * outputs * columns + factors < built:
            return "output"
        return "weight"

    def _positions(self, x: Tensor) -> int:
        """Count the positions of the output: tokens, or pixels."""
        if self.geometry is None:
            return x.shape[:-1].numel()
        images, pixels = x.shape[: self.geometry.channel_axis], x.shape[-self.geometry.dims :]
        return images.numel() * pixels.numel() // math.prod(self.geometry.stride)

    def _stands_for(self, weight: Tensor | None, x: Tensor) -> bool:
        """Whether U·diag(σ)·Vᵀ is still the weight, up to rounding: not trained, not cast, not replaced."""
        if weight is None or weight.requires_grad or not eager(x):
            return False
        if weight.dtype != x.dtype or x.dtype != self.left.dtype:
            return False
        if weight.is_meta or is_fake(weight):
            return True
        compared = self.compared
        if (weight.data_ptr(), weight._version) != (compared.pointer, compared.version):
            total, norm = _marks(weight)
            distance = max(abs(total - self.marks.total), abs(norm - self.marks.norm))
            is_decomposed = distance <= 1e-6 * self.marks.norm
            compared = self.compared = _Comparison(weight.data_ptr(), weight._version, is_decomposed)
        return compared.is_decomposed

    def _spectrum(self) -> Tensor:
        """relu(σ + s·δ), (k,)."""
        return (self.values + self.scale * self.delta).relu()

    def _shift(self) -> Tensor:
        """relu(σ + s·δ) − σ, (k,)."""
        return self._spectrum() - self.values

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute U·diag(relu(σ + s·δ))·(Vᵀ·x) + b without the layer."""
        return self._between_factors(x, self._spectrum(), bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + U·diag(relu(σ + s·δ) − σ)·(Vᵀ·x)."""
        return y + self._between_factors(cast(x, self.right), self._shift()).to(y.dtype)

    def _between_factors(self, x: Tensor, diagonal: Tensor, bias: Tensor | None = None) -> Tensor:
        """U·diag(…)·(Vᵀ·x); of a convolution, Vᵀ is one of its kind and U is a 1×1."""
        if self.geometry is None:
            return F.linear(F.linear(x, self.right) * diagonal, self.left, bias)
        hidden = self.geometry.convolve(x, self.geometry.as_kernel(self.right))
        return self.geometry.pointwise(
            hidden * along(diagonal, hidden, self.geometry.channel_axis), self.left, strided=False, bias=bias
        )

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + U·diag(relu(σ + s·δ) − σ)·Vᵀ."""
        if weight is None:
            return None, bias
        dtype = torch.promote_types(weight.dtype, self.left.dtype)
        matrix, left, right = _as_matrix(weight).to(dtype), self.left * self._shift(), self.right
        return torch.addmm(matrix, left.to(dtype), right.to(dtype)).view(weight.shape), bias


def _as_matrix(weight: Tensor) -> Tensor:
    """View a weight as (out, −1), and a norm's as (1, D)."""
    if weight.ndim == 1:
        return weight[None]
    return weight.flatten(1)


def _marks(weight: Tensor) -> _Marks:
    """Measure a weight; one without values has the marks 0."""
    if weight.is_meta or is_fake(weight):
        return _Marks(0.0, 0.0)
    wide = weight.detach().double()
    return _Marks(float(wide.sum()), float(wide.norm()))
