"""LoHa of one layer as LyCORIS and peft write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..architecture.site import Site
from ..checkpoint.save import plain
from ..formulas.loha import LoHa
from ..sharding import whole
from .by_layer import joined
from .products import Product, described, fits, put


@dataclass(frozen=True, eq=False)
class Hadamard:
    """LoHa of a layer: its weight changes by scale·first ⊙ second.

    Attributes:
        first: The product B₁·A₁.
        second: The product B₂·A₂.
        scale: The factor of both.
    """

    method: ClassVar[str] = "loha"
    first: Product
    second: Product
    scale: float

    @property
    def rank(self) -> int:
        """r, the larger one if they differ."""
        return max(self.first.rank, self.second.rank)

    def misshapen(self, site: Site) -> str:
        """Say why the factors do not fit a layer; "" if they do."""
        rows, columns, *kernel = site.host.shape
        for product in (self.first, self.second):
            if not fits(product, rows, columns, tuple(kernel)):
                return f"{described(product)} in the file does not make {tuple(site.host.shape)}"
        return ""

    @torch.no_grad()
    def fill(self, adapter: nn.Module, site: Site) -> None:
        """Put the factors into an adapter, whose rank may be larger; the scale goes into B₁."""
        assert isinstance(adapter, LoHa)
        first, second = self.first, self.second
        if adapter.tucker:
            assert first.core is not None
            assert second.core is not None
            put(adapter.core_1, first.core)
            put(adapter.core_2, second.core)
        else:
            first, second = first.without_core(), second.without_core()
        put(adapter.up_1, first.up, factor=self.scale, clear=True)
        put(adapter.down_1, first.down)
        put(adapter.up_2, second.up)
        put(adapter.down_2, second.down, clear=True)


def options_of_loha(changes: Mapping[str, Hadamard], sites: Mapping[str, Site]) -> dict[str, Any]:
    """Choose options of `loha` for the layers of a file: plain where all have the same, else by place."""
    of_layers = {}
    for name, site in sites.items():
        first, second = changes[name].first, changes[name].second
        options: dict[str, Any] = {"rank": changes[name].rank}
        if math.prod(site.host.shape[2:]) > 1:
            has_cores = first.core is not None and second.core is not None
            options["tucker"] = has_cores and first.rank == second.rank
        of_layers[name] = options
    return joined(of_layers, {"rank": 1, "tucker": False})


def hadamard_of(adapter: LoHa) -> Hadamard:
    """Copy the factors of an adapter."""
    factors = {name: plain(whole(parameter)) for name, parameter in adapter.named_parameters()}
    first = Product(factors["up_1"], factors["down_1"], factors.get("core_1"))
    second = Product(factors["up_2"], factors["down_2"], factors.get("core_2"))
    return Hadamard(first, second, float(adapter.scale))
