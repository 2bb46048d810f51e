"""LoRA of several files, combined layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters.adapter import state_of
from ..adapters.by_place import at
from ..errors import require
from ..formulas.lora import LoRA
from ..surgery.install import Built
from ..surgery.plan import Plan
from .changes import Recipe
from .low_rank import Fitted, combined, products_of, tensors_of
from .members import Member


@dataclass(frozen=True)
class LowRank:
    """Combined LoRA of one weight.

    Attributes:
        layer: Name of the layer.
        prefix: What the names of its tensors begin with.
        keys: What they end with in the files, all of them.
        dtype: Their dtype.
        fitted: Its products, one a part of the layer.
        bias: What it adds to the layer's bias, in float64; None where it has no bias of its own.
    """

    layer: str
    prefix: str
    keys: tuple[str, ...]
    dtype: torch.dtype
    fitted: list[Fitted]
    bias: Tensor | None

    @property
    def rank(self) -> int:
        """The largest rank of its products."""
        return max(one.product.rank for one in self.fitted)


def low_rank_of(members: Sequence[Member], recipe: Recipe, rank: int | None) -> list[LowRank]:
    """Combine LoRA, weight by weight."""
    weights = []
    for items in zip(*(member.prepared.built for member in members), strict=True):
        if not isinstance(items[0].adapter, LoRA):
            continue
        require(
            recipe.keeps_low_rank or rank is not None,
            f"how={recipe.how!r} leaves changes of no low rank: pass rank= for the nearest LoRA of it.",
        )
        weights.append(_of_one_weight(members, items, recipe, rank))
    return weights


def _of_one_weight(
    members: Sequence[Member], items: Sequence[Built], recipe: Recipe, rank: int | None
) -> LowRank:
    """Combine the adapters that the files have at one weight."""
    first = items[0]
    prefix = f"{first.site.name}.adapters.{first.name}.".lstrip(".")
    of_files, keys, shifts = [], set[str](), []
    for member, item in zip(members, items, strict=True):
        assert isinstance(item.adapter, LoRA)  # All files have the same methods at the same places.
        own = {key: member.tensors[prefix + key] for key in state_of(item.adapter)}
        keys.update(own)
        of_files.append(products_of(item.adapter, own))
        if "bias" in own:
            shifts.append(item.adapter.scale * own["bias"].double())
    fitted = []
    for number, products in enumerate(zip(*of_files, strict=True)):
        fitted.append(combined(f"{prefix}{number}", products, recipe, rank))
    bias = None
    if shifts:
        bias = recipe.combine(f"{prefix}bias", shifts)
    dtype = members[0].tensors[f"{prefix}up"].dtype
    return LowRank(first.site.name, prefix, tuple(keys), dtype, fitted, bias)


def tensors_of_lora(planned: Plan, low_rank: Sequence[LowRank]) -> dict[str, Tensor]:
    """Write combined LoRA as the tensors of the planned adapters, by their names in a file."""
    tensors = {}
    for item in low_rank:
        rank = at(planned.record.methods["lora"], item.layer)["rank"]
        own = tensors_of([one.product for one in item.fitted], rank)
        if item.bias is not None:
            own["bias"] = item.bias
        for key, tensor in own.items():
            tensors[item.prefix + key] = tensor.to(item.dtype)
    return tensors


def relative_error(low_rank: Sequence[LowRank]) -> float:
    """Compute what the rank left out of all changes together: ‖ΔW − B·A‖ / ‖ΔW‖."""
    lost, whole = 0.0, 0.0
    for item in low_rank:
        lost += sum(one.lost for one in item.fitted)
        whole += sum(one.whole for one in item.fitted)
    if whole == 0:
        return 0.0
    return float((lost / whole) ** 0.5)
