"""DiffFit: every bias and norm, and a scale at the end of every branch.

Xie et al., "DiffFit: Unlocking Transferability of Large Diffusion Models via Simple Parameter-Efficient
Fine-Tuning" (ICCV 2023), arXiv 2304.06648, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, along
from ..adapters.registry import register
from ..architecture.blocks import feed_forwards
from ..architecture.layers import channel_axis, is_norm
from ..architecture.network import Layer, Network
from ..architecture.site import Site
from .selective import bias as is_bias


def trains(name: str, parameter: nn.Parameter, layer: Layer) -> bool:
    """Every bias, and the parameters of every normalisation layer."""
    return is_bias(name, parameter, layer) or is_norm(layer.module)


@register(
    "difffit",
    hint="it scales the branches of transformer blocks. Try 'bias+norm' or 'ssf'.",
    selects=trains,
    takes_complex=True,
    by_image=True,
)
class DiffFit(Adapter):
    """A scale of the output of every attention and MLP, γ ⊙ y, beside every bias and norm of the model.

    γ has one element per channel and starts at one.

    Args:
        site: The last layer of an attention or MLP, linear or a convolution.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.gamma = nn.Parameter(torch.ones(site.host.shape[0]))
        self.axis = channel_axis(site.layer)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield the output projection of every attention and the last layer of every MLP."""
        last_layers = {mlp.last for mlp in feed_forwards(network)}
        for site in network.sites("linear", "conv"):
            ends_a_branch = "o" in site.parts or site.name in last_layers
            # A batch norm right after it would undo the scale.
            if ends_a_branch and not network.erased(site):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute γ ⊙ y."""
        return (y * along(self.gamma, y, self.axis)).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute diag(γ)·W and γ ⊙ b."""
        assert weight is not None
        scaled = weight * along(self.gamma, weight, 0)
        if bias is None:
            return scaled, None
        return scaled, bias * self.gamma
