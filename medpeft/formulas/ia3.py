"""(IA)³: a scale for every key, every value, and every hidden channel of the MLP.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (NeurIPS
2022), arXiv 2205.05638, Sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import ON_INPUT, ON_OUTPUT, Adapter, along, scale_columns
from ..adapters.in_place import in_place, writes_fresh_output
from ..adapters.registry import register
from ..adapters.scale_shift import Recovery, scale_shift
from ..architecture.blocks import feed_forwards
from ..architecture.layers import channel_axis
from ..architecture.network import Network
from ..architecture.rows import part_sizes, place_channels, replace_rows, take_rows
from ..architecture.site import Site


@register(
    "ia3",
    hint="it scales the keys, values and MLPs of transformers. Try 'ssf' or 'lora'.",
    takes_complex=True,
    by_image=True,
)
class IA3(Adapter):
    """A scale of keys, values and hidden channels of the MLP: l ⊙ K, l ⊙ V, and W₂·(l ⊙ γ(W₁·x)).

    l starts at one. A bias that the parent adds to keys or values, as in timm's BEiT, is not scaled.

    Args:
        site: A layer that makes keys or values, whose output is scaled, or any other linear layer or
            convolution, whose input is scaled.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.rows = site.rows
        self.axis, self.groups = channel_axis(site.layer), getattr(site.layer, "groups", 1)
        self.scales_input = not set(site.parts) & set("kv")
        outputs, inputs = site.host.shape[:2]
        if self.scales_input:
            place, channels = ON_INPUT, inputs * self.groups
        else:
            place, channels = ON_OUTPUT, sum(part_sizes(site.rows, outputs))
        if not site.only_weight:
            self.acts_on = place
        self.scale = nn.Parameter(torch.ones(channels))
        self.recovery = Recovery()
        self.fresh = writes_fresh_output(site.layer) and not site.draft.overwritten

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield the projections of keys and values, and the last layer of every MLP.

        With a target, yield every linear layer and convolution.
        """
        last_layers = {mlp.last for mlp in feed_forwards(network)}
        for site in network.sites("linear", "conv"):
            # A batch norm right after it would undo the scale.
            makes_keys_or_values = bool(set(site.parts) & set("kv")) and not network.erased(site)
            is_any_other = targeted and not site.parts
            if makes_keys_or_values or site.name in last_layers or is_any_other:
                yield site.with_parts("kv")

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Compute l ⊙ x."""
        return (x * along(self.scale, x, self.axis)).to(x.dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute l ⊙ y, in the channels of the keys and values."""
        every_channel = self.scale.new_empty(y.shape[self.axis])
        scale = place_channels(self.scale, self.rows, every_channel, -1, fill=1.0)
        if self.fresh and in_place(y):
            # The attention keeps the scaled y anyway; y itself is recomputed from it in backward.
            return scale_shift(
                y, scale, torch.zeros_like(scale), self.axis, self.recovery, self.scale._version
            )
        return (y * along(scale, y, self.axis)).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W·diag(l) for a scaled input, else diag(l)·W and l ⊙ b in the rows of keys and values."""
        assert weight is not None
        if self.scales_input:
            return scale_columns(weight, self.scale, self.groups), bias
        matrix = weight.flatten(1)  # (O, I, …) → (O, I·…)
        scaled = take_rows(matrix, self.rows) * self.scale[:, None]
        new_weight = replace_rows(matrix, self.rows, scaled).view_as(weight)
        if bias is None:
            return new_weight, None
        return new_weight, replace_rows(bias, self.rows, take_rows(bias, self.rows) * self.scale)
