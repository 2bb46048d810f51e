"""SV-Diff: a shift of every weight's singular values.

Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning" (ICCV 2023), arXiv 2303.11305, Eq. 2
and 3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..adapters.adapter import ON_WEIGHT, FlexibleAdapter, cast
from ..adapters.kernels import eager, writes_fresh_output
from ..adapters.registry import register
from ..architecture.convolution import Geometry
from ..architecture.network import Network
from ..architecture.site import Site
from .svd import decompose

# Positions for which the form in inference is chosen: 16 × 16, a usual number of tokens.
_POSITIONS = 256


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

    def __init__(self, site: Site, *, scale: float = 1.0, keep_svd: bool = False) -> None:
        super().__init__(site)
        host = site.host
        left, values, right = decompose(host.flatten(1) if host.ndim > 1 else host[None])
        self.delta = nn.Parameter(torch.zeros(values.shape[0], device=values.device, dtype=values.dtype))
        self.scale = scale
        # By these it notices that the weight is no longer the one that it took apart.
        self.marks, self.compared = _marks(host), (0, 0, False)
        self.acts_on = ON_WEIGHT
        self.geometry = Geometry.of(site.layer) if site.kind == "conv" else None  # type: ignore[arg-type]  # a convolution
        # The forms cost differently at different numbers of tokens; a weight that a parent reads leaves no
        # choice.
        plain = not site.readers and writes_fresh_output(site.layer)
        self.chooses = plain and (
            site.kind == "linear" or (self.geometry is not None and self.geometry.groups == 1)
        )
        for name, tensor in (("left", left), ("values", values), ("right", right)):
            self.register_buffer(name, tensor.contiguous(), persistent=keep_svd)

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, norms: bool = False) -> Iterator[Site]:
        """Linear and convolution layers; norms too with norms=True; embeddings where a target picks them."""
        kinds = (
            "linear",
            "conv",
            "transposed",
            *(("norm",) if norms else ()),
            *(("embedding",) if targeted else ()),
        )
        for site in network.sites(*kinds):
            if site.tensor(site.weight) is not None:
                yield site

    def _shift(self) -> Tensor:
        return (self.values + self.scale * self.delta).relu() - self.values

    def form(self, x: Tensor, weight: Tensor | None) -> Literal["weight", "output", "compute"]:
        """Choose the form with the fewest operations: U and V as two layers, or a weight built of them.

        Without gradients U·diag(…)·Vᵀ comes on top of W, so that nothing but the shift is rounded. The choice
        then depends on the layer alone, so that an image gives the same in a batch of any size.
        """
        if not self.chooses:
            return "weight"
        outputs, columns, rank = len(self.left), self.right.shape[1], len(self.values)
        if not torch.is_grad_enabled() or torch._C._is_tracing():
            return "output" if _POSITIONS * (outputs + columns) < outputs * columns else "weight"
        rows = x.shape[:-1].numel()
        if self.geometry is not None:
            rows = x.shape[0] * x.shape[2:].numel() // math.prod(self.geometry.stride)
        # In training the weight's own gradient comes on top, and its product with U.
        built = (3 * rows + 2 * rank) * outputs * columns
        # A built weight's gradient needs x, which a convolution's neighbours keep anyway; the factors keep
        # Vᵀ·x.
        margin = 1.0 if self.geometry is None else 1.25
        if margin * 2 * rows * rank * (outputs + columns) < built and self._stands_for(weight, x):
            return "compute"
        return "output" if 2 * rows * (outputs * columns + rank * (outputs + columns)) < built else "weight"

    def _stands_for(self, weight: Tensor | None, x: Tensor) -> bool:
        """Whether U·diag(σ)·Vᵀ is the weight, to within rounding: nobody trains it, casts it, or has loaded another since."""
        if (
            weight is None
            or weight.requires_grad
            or not eager(x)
            or not weight.dtype == x.dtype == self.left.dtype
        ):
            return False
        if weight.is_meta or is_fake(weight):
            return True
        now = weight.data_ptr(), weight._version
        if now != self.compared[:2]:
            found, (total, norm) = _marks(weight), self.marks
            self.compared = *now, max(abs(found[0] - total), abs(found[1] - norm)) <= 1e-6 * norm
        return self.compared[2]

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute U·diag(relu(σ + s·δ))·(Vᵀ·x) + b without the layer."""
        spectrum = (self.values + self.scale * self.delta).relu()
        if self.geometry is None:
            return F.linear(F.linear(x, self.right) * spectrum, self.left, bias)
        dims = self.geometry.dims
        kernel = self.right.view(len(self.values), -1, *self.geometry.kernel)  # (k, I·k₁·…) → (k, I, k₁, …)
        hidden = self.geometry.convolve(x, kernel) * spectrum.view(-1, *[1] * dims)
        return self.geometry.pointwise(hidden, self.left, strided=False, bias=bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + ((x·V)·diag(relu(σ + s·δ) − σ))·Uᵀ; a convolution with V, then a 1×1 with U."""
        if self.geometry is not None:
            kernel = self.right.view(len(self.values), -1, *self.geometry.kernel)
            hidden = self.geometry.convolve(cast(x, kernel), kernel)
            shift = self._shift().view(-1, *[1] * self.geometry.dims)
            return y + self.geometry.pointwise(hidden * shift, self.left, strided=False).to(y.dtype)
        return y + F.linear(F.linear(cast(x, self.right), self.right) * self._shift(), self.left).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + U·diag(relu(σ + s·δ) − σ)·Vᵀ."""
        if weight is None:
            return None, bias
        matrix = (weight.flatten(1) if weight.ndim > 1 else weight[None]).to(self.left.dtype)
        return torch.addmm(matrix, self.left * self._shift(), self.right).view(weight.shape), bias


def _marks(weight: Tensor) -> tuple[float, float]:
    """Sum and norm; 0 of a weight without values."""
    if weight.is_meta or is_fake(weight):
        return 0.0, 0.0
    wide = weight.detach().double()
    return float(wide.sum()), float(wide.norm())
