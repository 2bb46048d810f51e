"""MiSS: one small matrix on the sum of the pieces of the input.

Kang & Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure" (2025), arXiv
2409.15371.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.options import Count
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site
from .whole_weights import projections_or_convolutions


@register(
    "miss",
    hint="it changes the weights of attentions. Try 'lora', or target='linear'.",
    search={"rank": (4, 16, 64)},
    by_image=True,
)
class MiSS(Adapter):
    """A change of the output by one small matrix: y + M·(Σ_j x_j), the input cut into pieces of r channels.

    M is (out, r) and starts at zero; a last piece that is shorter is filled up with zeros. It merges, as M
    side by side along the inputs.

    Args:
        site: A linear layer, or the `in_proj_weight` of an attention.
        rank: r; no more than the layer has inputs are used.
    """

    def __init__(self, site: Site, *, rank: Count = 16) -> None:
        super().__init__(site)
        outputs, inputs = site.host.shape
        self.rank = min(rank, inputs)
        self.matrix = nn.Parameter(torch.zeros(outputs, self.rank))

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of every attention."""
        yield from projections_or_convolutions(network, "linear", targeted=targeted)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + M·(Σ_j x_j)."""
        whole = F.pad(cast(x, self.matrix), (0, -x.shape[-1] % self.rank))
        pieces = whole.unflatten(-1, (-1, self.rank))  # (…, in) → (…, pieces, r)
        return y + F.linear(pieces.sum(-2), self.matrix).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + [M M … M], cut off at the inputs."""
        assert weight is not None
        inputs = weight.shape[1]
        repeated: Tensor = self.matrix.repeat(1, -(-inputs // self.rank))[:, :inputs]
        return weight + repeated, bias
