"""OFT: a rotation of every neuron's weights.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS 2023), arXiv 2306.07280, Sec. 3: R is
block-diagonal and made by the Cayley transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.registry import register
from ..architecture.layers import channel_axis
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require


@register(
    "oft",
    hint="it rotates the weights of attentions or convolutions. Try target='linear', or 'lora'.",
    search={"block_size": (4, 8, 16, 32, 64)},
    decays=False,
)
class OFT(Adapter):
    """A rotation of the weights of every neuron, W·R, with R block-diagonal and orthogonal: angles between neurons stay.

    Every block of R is (I + Q)·(I − Q)⁻¹ for a skew-symmetric Q, which starts at zero. A fused projection has one R for all its
    parts; that of a convolution acts on its input channels.

    Args:
        site: A linear layer or an ungrouped convolution, or the `in_proj_weight` of an attention.
        block_size: Rows of a block; the largest divisor of the layer's inputs that is no larger is taken.
    """

    def __init__(self, site: Site, *, block_size: int = 32) -> None:
        super().__init__(site)
        require(block_size > 1, f"block_size={block_size!r} must be at least 2: a number has nowhere to rotate.")
        width = site.host.shape[1]
        self.size = next(size for size in range(min(block_size, width), 0, -1) if width % size == 0)
        require(self.size > 1, f"{site.name} has {width} inputs, which no block_size up to {block_size} divides: exclude it.")
        self.skew = nn.Parameter(torch.zeros(width // self.size, self.size * (self.size - 1) // 2))
        self.axis = channel_axis(site.layer)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """All projections of every attention; every ungrouped convolution of a CNN."""
        convolutional = not network.attentions
        for site in network.sites("linear", "conv"):
            grouped = getattr(site.layer, "groups", 1) > 1
            if not grouped and site.host.shape[1] > 1 and (targeted or site.parts or (convolutional and site.kind == "conv")):
                yield site

    def turn(self) -> Tensor:
        """The blocks of R − I = 2·(I − Q)⁻¹·Q, (blocks, size, size), in float32 or wider; exactly zero at first."""
        values = self.skew.to(torch.promote_types(self.skew.dtype, torch.float32))
        row, column = torch.triu_indices(self.size, self.size, 1, device=values.device)
        upper = values.new_zeros(len(values), self.size**2).index_copy(1, row * self.size + column, values)
        upper = upper.unflatten(1, (self.size, self.size))
        skew, one = upper - upper.mT, torch.eye(self.size, dtype=values.dtype, device=values.device)
        turn: Tensor = torch.linalg.solve(one - skew, 2 * skew)
        return turn

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """R·x, over the channels of `x`."""
        inputs = cast(x, self.skew).movedim(self.axis, -1).unflatten(-1, (-1, self.size))
        change = torch.einsum("...nk,njk->...nj", inputs, self.turn().to(self.skew.dtype)).flatten(-2)
        return x + change.movedim(-1, self.axis).to(x.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W·R over the input channels."""
        assert weight is not None
        turn = self.turn()
        split = weight.movedim(1, -1).unflatten(-1, (-1, self.size)).to(turn.dtype)
        return weight + torch.einsum("...nj,njk->...nk", split, turn).flatten(-2).movedim(-1, 1), bias
