"""LoKr of one layer as LyCORIS and peft write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architecture.site import Site
from ..checkpoint.save import plain
from ..errors import CheckpointError
from ..formulas.lokr import LoKr, split
from ..sharding import whole
from .products import Product, described, fits, multiplied, put

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
        return max(_rank(self.first), _rank(self.second))

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


def _rank(value: Tensor | Product) -> int:
    if isinstance(value, Product):
        return value.rank
    return 0


def _shape(value: Tensor | Product) -> tuple[int, int]:
    if isinstance(value, Product):
        return value.up.shape[0], value.down.shape[1]
    return value.shape[0], value.shape[1]


def options_of_lokr(changes: Mapping[str, Kronecker], sites: Mapping[str, Site]) -> dict[str, Any]:
    """Choose options of `lokr` that hold every layer of a file.

    Raises:
        CheckpointError: no `factor` splits the channels of all layers as the file does.
    """
    fitting = {name: site for name, site in sites.items() if not changes[name].misshapen(site)}
    factor = _factor(changes, fitting)
    rank = max([1, *(change.rank for change in changes.values())])
    both = any(isinstance(change.first, Product) for change in changes.values())
    tucker = any(_has_core(change) for change in changes.values())
    for name, site in fitting.items():
        outputs, inputs, *kernel = site.host.shape
        a, b = changes[name].split
        second = changes[name].second
        if 2 * rank < max(outputs // a, inputs // b):
            if not isinstance(second, Product):
                return {"rank": _WHOLE, "factor": factor}
            spatial = any(side > 1 for side in kernel)
            tucker = tucker and (not spatial or (second.core is not None and second.rank == rank))
        if 2 * rank < max(a, b) and not isinstance(changes[name].first, Product):
            both = False
    return {"rank": rank, "factor": factor, "both": both, "tucker": tucker}


def _has_core(change: Kronecker) -> bool:
    return isinstance(change.second, Product) and change.second.core is not None


def _factor(changes: Mapping[str, Kronecker], sites: Mapping[str, Site]) -> int:
    """Find the `factor` that splits the channels of every layer as a file does."""
    for factor in _candidates(changes.values()):
        if all(_splits(changes[name].split, site, factor) for name, site in sites.items()):
            return factor
    raise CheckpointError(
        "its layers are split into Kronecker factors in ways that no single factor= of 'lokr' makes (such as "
        "unbalanced ones). Merge it into the weights with the library that wrote it, and load these."
    )


def _candidates(changes: Iterable[Kronecker]) -> list[int]:
    """List the factors that may have made the splits of a file."""
    sides = {-1}
    for change in changes:
        sides.update(change.split)
    return sorted(sides)


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
