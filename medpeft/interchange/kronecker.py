"""LoKr of one layer as LyCORIS and peft write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architecture.site import Site
from ..checkpoint.save import plain
from ..formulas.lokr import LoKr, split
from ..sharding import whole
from .by_layer import joined
from .products import Product, described, fits, multiplied, put, rank_of

# A rank with which `lokr` keeps every factor whole.
_WHOLE = 10_000


@dataclass(frozen=True, eq=False)
class Kronecker:
    """LoKr of a layer: its weight changes by scale·C ⊗ D.

    Attributes:
        first: C, (a, b).
        second: D, (out/a, in/b, kernel …), or (out/a, fan-in/b).
        scale: The factor of both.
    """

    method: ClassVar[str] = "lokr"
    first: Tensor | Product
    second: Tensor | Product
    scale: float

    @property
    def rank(self) -> int:
        """r, the larger one if those of C and D differ; 0 where both are whole."""
        return max(rank_of(self.first), rank_of(self.second))

    @property
    def split(self) -> tuple[int, int]:
        """(a, b): shape of C."""
        return _shape(self.first)

    def misshapen(self, site: Site) -> str:
        """Say why the factors do not fit a layer; "" if they do."""
        outputs, inputs, *kernel = site.host.shape
        a, b = self.split
        fitting = min(a, b) > 0 and outputs % a == 0 and inputs % b == 0 and fits(self.first, a, b, ())
        if fitting and fits(self.second, outputs // a, inputs // b, tuple(kernel)):
            return ""
        factors = f"{described(self.first)} and {described(self.second)}"
        return f"the factors {factors} in the file do not make {tuple(site.host.shape)}"

    @torch.no_grad()
    def fill(self, adapter: nn.Module, site: Site) -> None:
        """Put the factors into an adapter, which may keep them whole, or at a larger rank.

        The scale goes into C.
        """
        assert isinstance(adapter, LoKr)
        _fill(adapter.first, self.first, self.scale)
        _fill(adapter.second, self.second)


def _fill(target: nn.ParameterDict, value: Tensor | Product, factor: float = 1.0) -> None:
    """Put one of the two factors into the parameters in which an adapter keeps it."""
    if "whole" in target:
        whole_matrix = multiplied(value)
        # (out/a, fan-in/b) → (out/a, in/b, kernel …)
        target["whole"].copy_(whole_matrix.to(target["whole"]).view_as(target["whole"]) * factor)
        return
    assert isinstance(value, Product)
    if "core" in target:
        assert value.core is not None
        put(target["core"], value.core)
    else:
        value = value.without_core()
    put(target["up"], value.up, factor=factor, clear=True)
    put(target["down"], value.down)


def _shape(value: Tensor | Product) -> tuple[int, int]:
    if isinstance(value, Product):
        return value.up.shape[0], value.down.shape[1]
    return value.shape[0], value.shape[1]


def options_of_lokr(changes: Mapping[str, Kronecker], sites: Mapping[str, Site]) -> dict[str, Any]:
    """Choose options of `lokr` for the layers of a file: plain where one value holds all, else by place."""
    fitting = {name: site for name, site in sites.items() if not changes[name].misshapen(site)}
    common = max([1, *(change.rank for change in changes.values())])
    factor = _common_factor(changes, fitting)
    of_layers = {}
    for name in sites:
        options: dict[str, Any] = {}
        if name in fitting:
            options = _needed(changes[name], fitting[name], common)
        if name in fitting and factor is None:
            options["factor"], options["input_factor"] = changes[name].split
        of_layers[name] = options
    defaults = {"rank": common, "factor": factor or -1, "input_factor": None, "both": False, "tucker": False}
    return joined(of_layers, defaults)


def _needed(change: Kronecker, site: Site, common: int) -> dict[str, Any]:
    """Choose the options that one layer needs, the common rank if that holds it."""
    outputs, inputs, *kernel = site.host.shape
    a, b = change.split
    longest = max(outputs // a, inputs // b)
    second, rank = change.second, change.rank or common
    if not isinstance(second, Product) and 2 * rank < longest:
        rank = common
        if 2 * common < longest:
            rank = _WHOLE
    options: dict[str, Any] = {"rank": rank}
    if 2 * rank < max(a, b):
        options["both"] = isinstance(change.first, Product)
    if isinstance(second, Product) and 2 * rank < longest and any(side > 1 for side in kernel):
        options["tucker"] = second.core is not None and second.rank == rank
    return options


def _common_factor(changes: Mapping[str, Kronecker], sites: Mapping[str, Site]) -> int | None:
    """Find the `factor` that splits the channels of every layer as a file does; None if there is none."""
    candidates = {-1}
    for change in changes.values():
        candidates.update(change.split)
    for factor in sorted(candidates):
        if all(_splits(changes[name].split, site, factor) for name, site in sites.items()):
            return factor
    return None


def _splits(shape: tuple[int, int], site: Site, factor: int) -> bool:
    if factor == 0:
        return False
    outputs, inputs = site.host.shape[:2]
    return shape == (split(outputs, factor)[0], split(inputs, factor)[0])


def kronecker_of(adapter: LoKr) -> Kronecker:
    """Copy the factors of an adapter."""
    return Kronecker(_copied(adapter.first), _copied(adapter.second), float(adapter.scale))


def _copied(factors: nn.ParameterDict) -> Tensor | Product:
    copies = {name: plain(whole(parameter)) for name, parameter in factors.items()}
    if "whole" in copies:
        return copies["whole"]
    return Product(copies["up"], copies["down"], copies.get("core"))
