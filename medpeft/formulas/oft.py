"""OFT: a rotation of every neuron's weights.

Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning" (NeurIPS 2023), arXiv 2306.07280,
Sec. 3: R is block-diagonal and made by the Cayley transform.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.options import Must
from ..adapters.registry import register
from ..architecture.layers import channel_axis
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require

BlockSize = Annotated[int, Must("be at least 2: a number has nowhere to rotate", lambda n: 2 <= n < 2**24)]


@register(
    "oft",
    hint="it rotates the weights of attentions or convolutions. Try target='linear', or 'lora'.",
    search={"block_size": (4, 8, 16, 32, 64)},
    decays=False,
    by_image=True,
)
class OFT(Adapter):
    """A rotation of the weights of every neuron that keeps the angles between neurons: W·R.

    R is block-diagonal and orthogonal. Every block is (I + Q)·(I − Q)⁻¹ for a skew-symmetric Q, which
    starts at zero. A fused projection has one R for all its parts; that of a convolution acts on its input
    channels.

    Args:
        site: A linear layer or an ungrouped convolution, or the `in_proj_weight` of an attention.
        block_size: Rows of a block. The largest divisor of the layer's inputs that is no larger is taken.
    """

    def __init__(self, site: Site, *, block_size: BlockSize = 32) -> None:
        super().__init__(site)
        width = site.host.shape[1]
        self.size = _largest_divisor(width, block_size)
        require(
            self.size > 1,
            f"{site.name} has {width} inputs, which no block_size up to {block_size} divides: exclude it.",
        )
        blocks, above_diagonal = width // self.size, self.size * (self.size - 1) // 2
        self.skew = nn.Parameter(torch.zeros(blocks, above_diagonal))
        self.axis = channel_axis(site.layer)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of every attention; every ungrouped convolution of a CNN."""
        convolutional = not network.attentions
        for site in network.sites("linear", "conv"):
            if getattr(site.layer, "groups", 1) > 1 or site.host.shape[1] == 1:
                continue
            if targeted or site.parts or (convolutional and site.kind == "conv"):
                yield site

    def turn(self) -> Tensor:
        """Compute the blocks of R − I = 2·(I − Q)⁻¹·Q, (blocks, size, size); exactly zero at first.

        In float32, or the dtype of Q if that is wider.
        """
        values = self.skew.to(torch.promote_types(self.skew.dtype, torch.float32))
        row, column = torch.triu_indices(self.size, self.size, 1, device=values.device)
        flat = values.new_zeros(len(values), self.size**2).index_copy(1, row * self.size + column, values)
        upper = flat.unflatten(1, (self.size, self.size))  # (blocks, size²) → (blocks, size, size)
        skew = upper - upper.mT
        one = torch.eye(self.size, dtype=values.dtype, device=values.device)
        turn: Tensor = torch.linalg.solve(one - skew, 2 * skew)
        return turn

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Compute R·x over the channels of `x`."""
        channels_last = cast(x, self.skew).movedim(self.axis, -1)  # (B, D, …) → (B, …, D)
        by_block = channels_last.unflatten(-1, (-1, self.size))  # (…, D) → (…, blocks, size)
        turned = torch.einsum("...nk,njk->...nj", by_block, self.turn().to(self.skew.dtype))
        change = turned.flatten(-2)  # (…, blocks, size) → (…, D)
        return x + change.movedim(-1, self.axis).to(x.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W·R over the input channels."""
        assert weight is not None
        turn = self.turn()
        inputs_last = weight.movedim(1, -1)  # (out, D, …) → (out, …, D)
        by_block = inputs_last.unflatten(-1, (-1, self.size))  # (out, …, D) → (out, …, blocks, size)
        turned = torch.einsum("...nj,njk->...nk", by_block.to(turn.dtype), turn)
        change = turned.flatten(-2).movedim(-1, 1)  # (out, …, blocks, size) → (out, …, D) → (out, D, …)
        return weight + change, bias


def _largest_divisor(width: int, most: int) -> int:
    """Find the largest divisor of `width` up to `most`."""
    for size in range(min(most, width), 1, -1):
        if width % size == 0:
            return size
    return 1
