"""AdaptFormer: a bottleneck beside the MLP of every transformer block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition" (NeurIPS 2022),
arXiv 2205.13535, Eq. 2 and 3. x is the residual stream, as in the authors' code; the figure has LN(x).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace
from ..adapters.handover import Handover
from ..adapters.options import Count, Factor, Probability
from ..adapters.registry import register
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.site import Site
from .stream import before_mlp, in_shape_of
from .two_matrices import TwoMatrices


@register(
    "adaptformer",
    hint="it adapts transformer blocks with an attention, a norm and an MLP. Try 'lora' or 'ssf'.",
    search={
        "bottleneck": (16, 32, 64, 128),
        "scale": (0.1, 1.0, "learnable"),
        "dropout": (0.0, 0.1),
    },
)
class AdaptFormer(Adapter, TwoMatrices):
    """A bottleneck parallel to the MLP of every transformer block: y + s·up(drop(relu(down(x)))).

    x is the residual stream after attention, (B, …, D); the sum is outside drop-path and LayerScale.

    Args:
        site: A transformer block. Its partners are where x may enter: the norm before the MLP, and the MLP.
        bottleneck: Width between `down` and `up`.
        scale: s, or "learnable" (one scalar, initially 1).
        dropout: Probability between `down` and `up`.
    """

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: Count = 64,
        scale: Factor | Literal["learnable"] = 0.1,
        dropout: Probability = 0.1,
    ) -> None:
        super().__init__(site)
        block, mlp = site.layout, site.partners[-1].site.layout
        assert block is not None
        assert mlp is not None
        self.axis_in, self.axis_out = mlp.axis, block.axis
        self.add_down(mlp.inputs, bottleneck)
        self.add_up(bottleneck, mlp.outputs)
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=site.generator)
        self.scale: float | nn.Parameter
        if scale == "learnable":
            self.scale = nn.Parameter(torch.ones(()))
        else:
            self.scale = float(scale)
        self.dropout = nn.Dropout(dropout)
        self.handover = Handover()

    @classmethod
    def sites(
        cls,
        network: Network,
        *,
        targeted: bool = False,
        input: Literal["residual", "norm"] = "residual",
    ) -> Iterator[Site]:
        """Yield the transformer blocks; x is the residual stream, or with input="norm" its norm."""
        for block in branches(network):
            # In a block that normalises after its MLP, the MLP runs first, and its input is the stream.
            entrances = [block.norm, block.mlp]
            if input == "norm":
                entrances = [block.mlp]
            partners = before_mlp(block, entrances, Entrance)
            yield Site(block.name, block.module, "", "", layout=block.layout, partners=partners)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s·up(drop(relu(down(x)))): `y` is the block's output, and an entrance has left x."""
        stream = self.handover.take(x)
        hidden = self.dropout(self.narrow(stream, self.axis_in).relu())
        change = self.scale * self.widen(hidden, self.axis_out)
        return y + in_shape_of(y, change).to(y.dtype)


class Entrance(SecondPlace):
    """Second place of AdaptFormer: the norm before the MLP, or the MLP. Its input is the adapter's x."""

    first: AdaptFormer

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Leave `x` for the adapter of the block, and return it unchanged."""
        self.first.handover.leave(x)
        return x
