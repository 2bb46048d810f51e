"""SSF: a scale and a shift for every channel.

Lian, Zhou, Feng & Wang, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning"
(NeurIPS 2022), arXiv 2210.08823, Eq. 2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, along
from ..adapters.kernels import in_place, scale_shift, writes_fresh_output
from ..adapters.registry import register
from ..architecture.layers import channel_axis, is_scaling_norm, norm_channels
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require_choice

_KINDS = {"all": ("linear", "conv", "transposed", "norm"), "norm": ("norm",), "linear": ("linear",)}
_KINDS["conv"] = ("conv", "transposed")


@register(
    "ssf",
    hint="it scales the outputs of linear, convolution and norm layers. Try 'bias' or 'full'.",
    search={"init": ("identity", "official"), "sites": ("all", "norm")},
)
class SSF(Adapter):
    """Scale and shift of every layer's output, per channel: y·γ + β.

    Args:
        site: A linear, convolution or norm layer; γ and β have one element per output channel. There is no β
            where a parent reads the layer's weight and brings a bias of its own, as timm's BEiT does.
        init: "identity" (γ = 1, β = 0), or "official" (γ from N(1, 0.02²), β from N(0, 0.02²)).
        keep_outputs: Keep y for backward. False finds y again from y·γ + β, which takes half the memory, and
            does not work in a model that changes a layer's output in place. None is True where a module of
            the model has `inplace=True`.
    """

    def __init__(self, site: Site, *, init: str = "identity", keep_outputs: bool | None = None) -> None:
        super().__init__(site)
        require_choice("init", init, ("identity", "official"))
        channels = _channels(site)
        self.scale = nn.Parameter(torch.ones(channels))
        self.shift = nn.Parameter(torch.zeros(channels)) if site.bias else None
        if init == "official":
            nn.init.normal_(self.scale, 1.0, 0.02, generator=site.generator)
            if self.shift is not None:
                nn.init.normal_(self.shift, 0.0, 0.02, generator=site.generator)
        self.axis = channel_axis(site.layer)
        keeps = site.draft.overwritten if keep_outputs is None else keep_outputs
        self.inverts = writes_fresh_output(site.layer) and not keeps
        self.groups = getattr(site.layer, "groups", 1) if site.kind == "transposed" else 0
        # Inside a norm's own affine it costs nothing, and comes before the activation that timm fuses into
        # some norms.
        if site.kind == "norm":
            self.acts_on = ON_WEIGHT

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, sites: str = "all") -> Iterator[Site]:
        """Linear, convolution and norm layers; not those whose scale a batch or instance norm right after them undoes."""
        require_choice("sites", sites, tuple(_KINDS))
        for site in network.sites(*_KINDS[sites]):
            if site.kind == "norm" and not (is_scaling_norm(site.layer) and _channels(site)):
                continue
            if site.kind != "norm" and network.erased(site):
                continue
            yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y·γ + β on the channel axis of `y`."""
        scale, shift = self.scale, self.shift
        if self.inverts and in_place(y):
            return scale_shift(y, scale, shift, self.axis)
        return (y * along(scale, y, self.axis) + along(shift, y, self.axis)).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W·γ over the output channels, b·γ + β."""
        scaled = self.scale if weight is None else self._scaled(weight)
        return scaled, self.shift if bias is None or self.shift is None else bias * self.scale + self.shift

    def _scaled(self, weight: Tensor) -> Tensor:
        if self.groups:  # A transposed convolution's weight is (in, out / groups, …).
            split = weight.unflatten(0, (self.groups, -1))
            scale = self.scale.view(self.groups, 1, -1, *[1] * (weight.ndim - 2))
            scaled: Tensor = (split * scale).flatten(0, 1)
            return scaled
        return weight * self.scale.view(-1, *[1] * (weight.ndim - 1))


def _channels(site: Site) -> int:
    if site.kind == "norm":
        return norm_channels(site.layer)
    host = site.host
    return host.shape[1] * getattr(site.layer, "groups", 1) if site.kind == "transposed" else host.shape[0]
