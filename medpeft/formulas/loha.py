"""LoHa: a change of the weight that is the elementwise product of two low-rank matrices.

Hyeon-Woo, Ye-Bin & Oh, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning"
(ICLR 2022), arXiv 2108.06098, Eq. 2 and Prop. 3; Yeh et al., LyCORIS (ICLR 2024), arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.options import Count, Factor
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site
from .whole_weights import factor, projections_or_convolutions, with_kernel


@register(
    "loha",
    hint="it changes the weights of attentions or convolutions. Try target='linear', or 'lora'.",
    search={"rank": (2, 4, 8, 16)},
)
class LoHa(Adapter):
    """A change of the weight of rank up to r², W + (α/r)·(B₁·A₁) ⊙ (B₂·A₂), by two pairs of rank r.

    Every A is (r, fan-in) and every B (out, r), on the weight taken as a matrix. A₂ starts at zero.

    Args:
        site: A linear layer or a convolution, or the `in_proj_weight` of an attention.
        rank: r.
        alpha: α; r if None.
        tucker: Keep the kernel of a convolution apart, in two cores of (r, r, …), so that A is (r, in).
    """

    def __init__(
        self, site: Site, *, rank: Count = 8, alpha: Factor | None = None, tucker: bool = False
    ) -> None:
        super().__init__(site)
        outputs, inputs, *kernel = site.host.shape
        self.scale = (rank if alpha is None else alpha) / rank
        self.tucker = tucker and any(side > 1 for side in kernel)
        columns = inputs if self.tucker else site.host.flatten(1).shape[1]
        self.up_1, self.down_1 = factor(site, outputs, rank), factor(site, rank, columns)
        self.up_2, self.down_2 = factor(site, outputs, rank), nn.Parameter(torch.zeros(rank, columns))
        if self.tucker:
            self.core_1 = factor(site, rank, rank, *kernel)
            self.core_2 = factor(site, rank, rank, *kernel)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of every attention; all convolutions of a CNN."""
        yield from projections_or_convolutions(network, "linear", "conv", "transposed", targeted=targeted)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + (α/r)·(B₁·A₁) ⊙ (B₂·A₂)."""
        assert weight is not None
        if self.tucker:
            first = with_kernel(self.core_1, self.up_1, self.down_1)
            second = with_kernel(self.core_2, self.up_2, self.down_2)
        else:
            # (out, fan-in) → (out, in, …)
            first = (self.up_1 @ self.down_1).view(weight.shape)
            second = (self.up_2 @ self.down_2).view(weight.shape)
        return weight + self.scale * first * second, bias
