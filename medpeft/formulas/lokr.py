"""LoKr: a change of the weight that is a Kronecker product.

Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation" (ICLR
2024), arXiv 2309.14859, Sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.options import Count, Factor, Must
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site
from .whole_weights import factor, projections_or_convolutions, with_kernel

Divisor = Annotated[int, Must("be -1 or at least 1", lambda n: n == -1 or 1 <= n < 2**24)]


@register(
    "lokr",
    hint="it changes the weights of attentions or convolutions. Try target='linear', or 'lora'.",
    search={"rank": (4, 8, 16, 10_000), "factor": (-1, 4, 8, 16)},
    by_image=True,
)
class LoKr(Adapter):
    """A change of the weight that is a Kronecker product of two small matrices: W + (α/r)·C ⊗ D.

    C is (a, b) and D (out/a, in/b, …), on the channels of a convolution with its kernel inside D. D is a
    product of rank r where r is below half of its longer side, else whole. C starts at zero.

    Args:
        site: A linear layer or a convolution, or the `in_proj_weight` of an attention.
        rank: r.
        alpha: α; r if None.
        factor: a and b where it divides the channels, else their largest divisors up to it. -1 takes those
            nearest the square root.
        input_factor: The same for b alone; `factor` if None.
        tucker: Keep the kernel of a convolution in a core of (r, r, …) where D is a product.
        both: Make C a product of rank r too, where r is below half of its longer side.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 8,
        alpha: Factor | None = None,
        factor: Divisor = -1,
        input_factor: Divisor | None = None,
        tucker: bool = False,
        both: bool = False,
    ) -> None:
        super().__init__(site)
        outputs, inputs, *kernel = site.host.shape
        self.scale = (rank if alpha is None else alpha) / rank
        a, c = split(outputs, factor)
        b, d = split(inputs, factor if input_factor is None else input_factor)
        self.shape = (c, d, *kernel)
        self._make_first(site, a, b, rank if both and 2 * rank < max(a, b) else 0)
        tucker = tucker and any(side > 1 for side in kernel)
        self._make_second(site, rank if 2 * rank < max(c, d) else 0, tucker=tucker)
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of every attention; all convolutions of a CNN."""
        yield from projections_or_convolutions(network, "linear", "conv", "transposed", targeted=targeted)

    def _make_first(self, site: Site, a: int, b: int, rank: int) -> None:
        """Make C, whole or as a product; either is zero at first."""
        self.first = nn.ParameterDict()
        if rank:
            self.first["up"] = nn.Parameter(torch.zeros(a, rank))
            self.first["down"] = factor(site, rank, b)
        else:
            self.first["whole"] = nn.Parameter(torch.zeros(a, b))

    def _make_second(self, site: Site, rank: int, *, tucker: bool) -> None:
        """Make D, whole, as a product, or as one with a core for the kernel."""
        self.second = nn.ParameterDict()
        c, d, *kernel = self.shape
        if not rank:
            self.second["whole"] = factor(site, *self.shape)
            return
        self.second["up"] = factor(site, c, rank)
        if tucker:
            self.second["down"] = factor(site, rank, d)
            self.second["core"] = factor(site, rank, rank, *kernel)
        else:
            self.second["down"] = factor(site, rank, d * torch.Size(kernel).numel())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Compute (α/r)·C, (a, b), and D, (out/a, in/b, …)."""
        return self.scale * _product(self.first), _product(self.second).view(self.shape)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + (α/r)·(C ⊗ D)·x of a linear layer without making the product."""
        first, second = self.factors()
        pieces = cast(x, first).unflatten(-1, (first.shape[1], -1))  # (…, in) → (…, b, in/b)
        turned = F.linear(pieces, second)  # (…, b, out/a)
        change = torch.einsum("ab,...bc->...ac", first, turned).flatten(-2)  # (…, a, out/a) → (…, out)
        return y + change.to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + (α/r)·C ⊗ D."""
        assert weight is not None
        first, second = self.factors()
        # (a, 1, b, 1, 1) · (1, out/a, 1, in/b, kernel) → (a, out/a, b, in/b, kernel) → (out, in, …)
        kernels = second.view(1, self.shape[0], 1, self.shape[1], -1)
        product = first[:, None, :, None, None] * kernels
        return weight + product.reshape(weight.shape), bias


def _product(factors: nn.ParameterDict) -> Tensor:
    """Multiply out what a matrix is kept as."""
    if "whole" in factors:
        whole: Tensor = factors["whole"]
        return whole
    if "core" in factors:
        return with_kernel(factors["core"], factors["up"], factors["down"])
    product: Tensor = factors["up"] @ factors["down"]
    return product


def split(channels: int, factor: int) -> tuple[int, int]:
    """Split a number of channels into two factors.

    Args:
        channels: the number.
        factor: the first of the two where it divides the number; else the largest divisor up to it that is
            no larger than the second. -1 for the divisors nearest the square root.

    Examples:
        >>> split(768, -1), split(768, 4), split(127, 8)
        ((24, 32), (4, 192), (1, 127))
    """
    if factor > 0 and channels % factor == 0:
        return factor, channels // factor
    most = int(channels**0.5)
    if factor > 0:
        most = min(most, factor)
    for divisor in range(most, 0, -1):
        if channels % divisor == 0:
            return divisor, channels // divisor
    return 1, channels
