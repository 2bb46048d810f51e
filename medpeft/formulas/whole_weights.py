"""What methods have in common that change a layer's whole weight: where, and the start of their factors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..architecture.network import Network
from ..architecture.site import Site


def projections_or_convolutions(network: Network, *kinds: str, targeted: bool) -> Iterator[Site]:
    """Yield all projections of every attention, in a CNN all convolutions; with a target all of the kinds.

    A fused projection is one site: its weight changes as a whole.
    """
    convolutional = not network.attentions
    for site in network.sites(*kinds):
        if targeted or site.parts or (convolutional and site.kind == "conv"):
            yield site


def factor(site: Site, *shape: int) -> nn.Parameter:
    """Make a factor of a change, uniform within 1 / √columns (Kaiming-uniform with a = √5)."""
    values = nn.Parameter(torch.empty(shape))
    nn.init.kaiming_uniform_(values, a=5**0.5, generator=site.generator)
    return values


def with_kernel(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Multiply a core (r, r, …) of a kernel by factors (out, r) and (r, in): (out, in, …)."""
    return torch.einsum("ij...,oi,jp->op...", core, up, down)
