"""RepAdapter: two linear maps before each branch, so thin that they vanish in the branch's first layer.

Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization" (2023), arXiv 2302.08106, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.registry import register
from ..architecture.blocks import feed_forwards
from ..architecture.layers import channel_axis
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require, require_positive


class Maps(nn.Module):
    """`down`, D to r channels, and `up`, r to D in groups; with biases, or without where the layer can have none."""

    def __init__(self, width: int, bottleneck: int, groups: int, biased: bool, generator: torch.Generator | None) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.zeros(groups, width // groups, bottleneck // groups))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck)) if biased else None
        self.up_bias = nn.Parameter(torch.zeros(width)) if biased else None
        nn.init.xavier_uniform_(self.down, generator=generator)


@register(
    "repadapter",
    hint="it adapts the attentions and MLPs of transformers. Try 'lora' or 'ssf'.",
    search={"scale": (0.1, 0.5, 1.0, 5.0, 10.0), "bottleneck": (4, 8, 16)},
)
class RepAdapter(Adapter):
    """Two thin linear maps before every attention and every MLP: x + s·up(down(x)), which merges into the layer it precedes.

    `up` maps every group of the bottleneck onto its own group of channels. Projections of one attention that are layers of
    their own, and an MLP's gate and its partner, share the maps before them, if as many channels enter.

    Args:
        site: A linear layer or 1×1 convolution that a branch begins with, or the `in_proj_weight` of an attention.
        bottleneck: Width between `down` and `up`.
        groups: Groups of `up`; they must divide the bottleneck and the layer's inputs.
        scale: s.
        dropout: Probability between `down` and `up`; 0 where a parent reads the layer's weight without calling it.
    """

    def __init__(self, site: Site, *, bottleneck: int = 8, groups: int = 2, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(site)
        require_positive("bottleneck", bottleneck)
        require_positive("groups", groups)
        width = site.host.shape[1]
        require(
            bottleneck % groups == 0 and width % groups == 0,
            f"groups={groups} must divide bottleneck={bottleneck} and the {width} inputs of {site.name}.",
        )
        require(0.0 <= dropout < 1.0, f"dropout={dropout!r} must be at least 0 and below 1.")
        reader = site.readers[0].name if site.readers else "its parent"
        require(
            self.acts_on != ON_WEIGHT or dropout == 0.0,
            f"dropout={dropout!r} cannot act at {site.name}, whose weight {reader} reads: use dropout=0.",
        )
        biased = bool(site.bias)
        branch = site.name.rpartition(".")[0] if site.weight == "weight" else site.name
        self.shared["maps"] = site.share(
            (branch, width, biased), lambda: Maps(width, bottleneck, groups, biased, site.generator)
        )
        self.scale, self.dropout = float(scale), nn.Dropout(dropout)
        self.axis = channel_axis(site.layer)

    @property
    def maps(self) -> Maps:
        """The two maps, which the projections of one branch share."""
        return self.shared["maps"]  # type: ignore[return-value]  # as it was made

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """What makes queries, keys and values, and the first layers of every MLP; with a target, all that fit."""
        first = {name for mlp in feed_forwards(network) for name in mlp.first}
        for site in network.sites("linear", "conv"):
            begins = set(site.parts) & set("qkv") or site.name in first
            if (begins or (targeted and not site.parts)) and _fits(site):
                yield site

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """x + s·up(down(x)), over the channels of `x`."""
        maps, inputs = self.maps, cast(x, self.maps.down).movedim(self.axis, -1)
        hidden = self.dropout(F.linear(inputs, maps.down, maps.down_bias)).unflatten(-1, (len(maps.up), -1))
        change = torch.einsum("...gk,gdk->...gd", hidden, maps.up).flatten(-2)
        if maps.up_bias is not None:
            change = change + maps.up_bias
        return x + (self.scale * change).movedim(-1, self.axis).to(x.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + s·(W·up)·down, and b + s·W·(up·down's bias + up's bias)."""
        assert weight is not None
        maps, matrix = self.maps, weight.flatten(1).to(self.maps.down.dtype)
        through = torch.einsum("ogd,gdk->ogk", matrix.unflatten(1, (len(maps.up), -1)), maps.up).flatten(1)
        new = (matrix + self.scale * through @ maps.down).view_as(weight)
        if maps.down_bias is None or maps.up_bias is None:
            return new, bias
        shift = self.scale * (through @ maps.down_bias + matrix @ maps.up_bias)
        return new, shift if bias is None else bias + shift


def _fits(site: Site) -> bool:
    """Whether what a linear map does to every position apart commutes with the layer's own way over positions."""
    layer: Any = site.layer
    plain = site.kind == "linear" or (set(layer.kernel_size) == {1} and layer.groups == 1 and set(layer.padding) <= {0})
    return plain and site.host.shape[1] > 1
