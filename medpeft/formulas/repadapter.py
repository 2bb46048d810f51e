"""RepAdapter: two linear maps before each branch, so thin that they vanish in the branch's first layer.

Luo et al., "Towards Efficient Visual Adaption via Structural Re-parameterization" (2023), arXiv 2302.08106,
Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.options import Count, Factor, Probability
from ..adapters.registry import register
from ..architecture.blocks import feed_forwards
from ..architecture.layers import channel_axis
from ..architecture.network import Network
from ..architecture.residual import convnext_blocks
from ..architecture.site import Site
from ..errors import MedpeftError, require


class Maps(nn.Module):
    """Two linear maps: `down` from D to r channels, and `up` from r to D in groups.

    They have biases unless the layer after them can have none.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        groups: int,
        biased: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(bottleneck, width))
        self.up = nn.Parameter(torch.zeros(groups, width // groups, bottleneck // groups))
        self.down_bias: nn.Parameter | None = None
        self.up_bias: nn.Parameter | None = None
        if biased:
            self.down_bias = nn.Parameter(torch.zeros(bottleneck))
            self.up_bias = nn.Parameter(torch.zeros(width))
        nn.init.xavier_uniform_(self.down, generator=generator)


@register(
    "repadapter",
    hint="it adapts the attentions and MLPs of transformers. Try 'lora' or 'ssf'.",
    search={"scale": (0.1, 0.5, 1.0, 5.0, 10.0), "bottleneck": (4, 8, 16)},
    by_image=True,
)
class RepAdapter(Adapter):
    """Two thin linear maps before every attention and every MLP: x + s·up(down(x)).

    In ConvNeXt the depthwise convolution is in the attention's place; the maps before it do not merge.

    `up` maps every group of the bottleneck onto its own group of channels. Projections of one attention
    that are layers of their own, and an MLP's gate and its partner, share the maps before them, if as many
    channels enter. Merging folds the maps into the layer after them.

    Args:
        site: A linear layer or 1×1 convolution that a branch begins with, or the `in_proj_weight` of an
            attention.
        bottleneck: Width between `down` and `up`.
        groups: Groups of `up`; they must divide the bottleneck and the layer's inputs.
        scale: s.
        dropout: Probability between `down` and `up`; 0 where a parent reads the layer's weight without
            calling it.
    """

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: Count = 8,
        groups: Count = 2,
        scale: Factor = 1.0,
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__(site)
        self.mixes_depthwise = _is_depthwise(site)
        width, biased = site.host.shape[1], bool(site.bias)
        if self.mixes_depthwise:
            width = site.host.shape[0]
        require(
            bottleneck % groups == 0 and width % groups == 0,
            f"groups={groups} must divide bottleneck={bottleneck} and the {width} inputs of {site.name}.",
        )
        self._require_dropout(site, dropout)
        self.shared["maps"] = site.share(
            (_branch_of(site), width, biased), lambda: Maps(width, bottleneck, groups, biased, site.generator)
        )
        self.scale, self.dropout = float(scale), nn.Dropout(dropout)
        self.axis = channel_axis(site.layer)

    def _require_dropout(self, site: Site, dropout: float) -> None:
        reader = "its parent"
        if site.readers:
            reader = site.readers[0].name
        require(
            self.acts_on != ON_WEIGHT or dropout == 0.0,
            f"dropout={dropout!r} cannot act at {site.name}, whose weight {reader} reads: use dropout=0.",
        )

    @property
    def maps(self) -> Maps:
        """The two maps, which the projections of one branch share."""
        return self.shared["maps"]  # type: ignore[return-value]  # as it was made

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield the projections of q, k and v, and the first layers of MLPs; with a target, all that fit.

        In ConvNeXt they are the depthwise convolution and the first layer of the MLP of every block.
        """
        first: set[str] = set()
        depthwise: set[str] = set()
        for mlp in feed_forwards(network):
            first.update(mlp.first)
        for block in convnext_blocks(network.modules):
            depthwise.add(block.depthwise)
            first.add(block.mlp)
        for site in network.sites("linear", "conv"):
            begins_branch = bool(set(site.parts) & set("qkv")) or site.name in first
            offered = begins_branch or (targeted and not site.parts)
            merges = _acts_on_every_position_apart(site) and site.host.shape[1] > 1
            before_depthwise = site.name in depthwise and not site.only_weight
            if before_depthwise or (offered and merges):
                yield site

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Compute x + s·up(down(x)) over the channels of `x`, in G groups."""
        maps = self.maps
        channels_last = cast(x, maps.down).movedim(self.axis, -1)  # (B, D, …) → (B, …, D)
        hidden = self.dropout(F.linear(channels_last, maps.down, maps.down_bias))
        by_group = hidden.unflatten(-1, (len(maps.up), -1))  # (…, r) → (…, G, r/G)
        change = torch.einsum("...gk,gdk->...gd", by_group, maps.up).flatten(-2)  # (…, G, D/G) → (…, D)
        if maps.up_bias is not None:
            change = change + maps.up_bias
        return x + (self.scale * change).movedim(-1, self.axis).to(x.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + s·(W·up)·down, and b + s·W·(up·down's bias + up's bias)."""
        assert weight is not None
        if self.mixes_depthwise:
            raise MedpeftError(
                "the maps before it mix channels, which a depthwise convolution keeps apart, and add a bias "
                "that its padding lacks"
            )
        maps = self.maps
        matrix = weight.flatten(1).to(maps.down.dtype)  # (out, D, 1, …) → (out, D)
        by_group = matrix.unflatten(1, (len(maps.up), -1))  # (out, D) → (out, G, D/G)
        through_up = torch.einsum("ogd,gdk->ogk", by_group, maps.up).flatten(1)  # (out, G, r/G) → (out, r)
        new_weight = weight + (self.scale * through_up @ maps.down).view_as(weight)
        if maps.down_bias is None or maps.up_bias is None:
            return new_weight, bias
        shift = self.scale * (through_up @ maps.down_bias + matrix @ maps.up_bias)
        if bias is None:
            return new_weight, shift
        return new_weight, bias + shift


def _branch_of(site: Site) -> str:
    """Name of the branch that the layer begins: its parent, or the attention that owns the weight itself.

    A depthwise convolution shares its maps with no other layer, and may have the MLP's parent.
    """
    if site.weight == "weight" and not _is_depthwise(site):
        return site.name.rpartition(".")[0]
    return site.name


def _is_depthwise(site: Site) -> bool:
    return site.kind == "conv" and getattr(site.layer, "groups", 1) == site.host.shape[0] > 1


def _acts_on_every_position_apart(site: Site) -> bool:
    """Whether the layer maps every position by itself, so that maps of channels before it can be merged."""
    if site.kind == "linear":
        return True
    layer: Any = site.layer
    return set(layer.kernel_size) == {1} and layer.groups == 1 and set(layer.padding) <= {0}
