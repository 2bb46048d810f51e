"""SSF: a scale and a shift for every channel.

Lian, Zhou, Feng & Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning"
(NeurIPS 2022), arXiv 2210.08823, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, JoiningAdapter, along, scale_columns, tensor_of
from ..adapters.in_place import eager, in_place, writes_fresh_output
from ..adapters.registry import register
from ..adapters.scale_shift import Recovery, scale_shift
from ..adapters.stand_in import stand_in
from ..architecture.layers import (
    channel_axis,
    is_scaling_norm,
    norm_channels,
    rounds_otherwise_with_weights,
)
from ..architecture.network import Network
from ..architecture.site import Site
from ..architecture.weight_reads import sets_attributes

# Kinds of layers by the option `sites`.
_KINDS = {
    "all": ("linear", "conv", "transposed", "norm"),
    "norm": ("norm",),
    "linear": ("linear",),
    "conv": ("conv", "transposed"),
}


@register(
    "ssf",
    hint="it scales the outputs of linear, convolution and norm layers. Try 'bias' or 'full'.",
    search={"init": ("identity", "official"), "sites": ("all", "norm")},
    takes_complex=True,
    by_image=True,
)
class SSF(JoiningAdapter):
    """Scale and shift of every layer's output, per channel: y·γ + β.

    Args:
        site: A linear, convolution or norm layer; γ and β have one element per output channel. There is no β
            where a parent reads the layer's weight and brings a bias of its own, as timm's BEiT does.
        init: "identity" (γ = 1, β = 0), or "official" (γ from N(1, 0.02²), β from N(0, 0.02²)).
        keep_outputs: Keep y for backward. False recomputes y from y·γ + β, which takes half the memory, and
            does not work in a model that changes a layer's output in place. None is True in a model with a
            module that may work in place, by `inplace=True` or by the source of its forward.
    """

    # For models that were pickled before there were these attributes.
    joins_norm: bool = False
    joins_layer: bool = False

    def __init__(
        self,
        site: Site,
        *,
        init: Literal["identity", "official"] = "identity",
        keep_outputs: bool | None = None,
    ) -> None:
        super().__init__(site)
        channels = _channels(site)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift: nn.Parameter | None = None
        if site.bias:
            self.shift = nn.Parameter(torch.zeros(channels))
        if init == "official":
            self._draw(site.generator)
        self.axis = channel_axis(site.layer)
        self.transposed, self.groups = site.kind == "transposed", getattr(site.layer, "groups", 1)
        if keep_outputs is None:
            keep_outputs = site.draft.overwritten
        self.recovery = Recovery()
        fresh_output = writes_fresh_output(site.layer)
        self.writes_in_place = fresh_output and not keep_outputs
        # A norm's own weight and bias absorb γ and β free of cost, and before the activation that timm fuses
        # into some norms.
        if site.kind == "norm" and not rounds_otherwise_with_weights(site.layer):
            self.acts_on = ON_WEIGHT
        is_changed_norm = site.kind == "norm" and self.acts_on == ON_WEIGHT and self.shift is not None
        # An attribute that the forward sets would stay on the stand-in of `_norm_with`.
        cls: Any = type(site.layer)  # mypy does not see that a class is hashable.
        self.joins_norm = is_changed_norm and not sets_attributes(cls)
        self.joins_layer = fresh_output and self.acts_on != ON_WEIGHT

    def _draw(self, generator: torch.Generator | None) -> None:
        """Draw γ and β near the identity, as the official code does."""
        nn.init.normal_(self.scale, 1.0, 0.02, generator=generator)
        if self.shift is not None:
            nn.init.normal_(self.shift, 0.0, 0.02, generator=generator)

    @classmethod
    def sites(
        cls,
        network: Network,
        *,
        targeted: bool = False,
        sites: Literal["all", "norm", "linear", "conv"] = "all",
    ) -> Iterator[Site]:
        """Yield linear, convolution and norm layers, but those whose scale a norm right after them undoes."""
        for site in network.sites(*_KINDS[sites]):
            if _fits(network, site):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y·γ + β on the channel axis of `y`."""
        scale, shift = tensor_of(self, "scale"), tensor_of(self, "shift")
        assert shift is not None  # It is None only where a parent reads the weight, and this does not run.
        if self.writes_in_place and in_place(y):
            return scale_shift(y, scale, shift, self.axis, self.recovery, scale._version)
        return (y * along(scale, y, self.axis) + along(shift, y, self.axis)).to(y.dtype)

    def with_layer(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Compute a norm with w·γ and b·γ + β, or one of torch's layers and then y·γ + β."""
        if self.joins_norm:
            return self._norm_with(layer, x)
        if self.joins_layer:
            return self.forward(x, type(layer).forward(layer, x))
        return None

    def _norm_with(self, norm: nn.Module, x: Tensor) -> Tensor | None:
        """Compute a norm with the weight and bias of `merged`; None where these may have to be cast."""
        weight, scale = tensor_of(norm, "weight"), tensor_of(self, "scale")
        if weight is None or not weight.dtype == scale.dtype == x.dtype or not eager(x):
            return None
        new_weight, new_bias = self.merged(weight, tensor_of(norm, "bias"))
        # A short cut of `stand_in.run_with`, which asks more of the class than is open here.
        copy = stand_in(norm, {"": {"weight": new_weight, "bias": new_bias}})
        output: Tensor = type(norm).forward(copy, x)
        return output

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Compute W·γ over the output channels, and b·γ + β; without a β None, which leaves b as it is."""
        scale, shift = tensor_of(self, "scale"), tensor_of(self, "shift")
        if bias is not None and shift is not None:
            return self._scaled(weight, scale), torch.addcmul(shift, bias, scale)
        return self._scaled(weight, scale), shift

    def _scaled(self, weight: Tensor | None, scale: Tensor) -> Tensor:
        if weight is None:
            return scale
        if weight.ndim == 1:
            return weight * scale
        if not self.transposed:
            return weight * along(scale, weight, 0)
        return scale_columns(weight, scale, self.groups)


def _fits(network: Network, site: Site) -> bool:
    """Whether a scale and a shift act in a layer and on what comes after it."""
    if site.kind == "norm":
        return is_scaling_norm(site.layer) and _channels(site) > 0
    return not network.erased(site)


def _channels(site: Site) -> int:
    """Count the channels of a layer's output; 0 where a norm does not tell."""
    if site.kind == "norm":
        return norm_channels(site.layer)
    return site.output_channels
