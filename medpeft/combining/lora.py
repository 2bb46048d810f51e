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
from ..surgery.plan import Plan
from .changes import Recipe
from .low_rank import Cut, combined, products_of, tensors_of
from .parts import Part


@dataclass(frozen=True)
class LowRank:
    """Combined LoRA of one weight.

    Attributes:
        layer: Name of the layer.
        prefix: What the names of its tensors begin with.
        keys: What they end with in the files.
        dtype: Their dtype.
        cuts: Its products, one a part of the layer.
    """

    layer: str
    prefix: str
    keys: tuple[str, ...]
    dtype: torch.dtype
    cuts: list[Cut]

    @property
    def rank(self) -> int:
        """The largest rank of its products."""
        return max(cut.product.rank for cut in self.cuts)


def low_rank_of(parts: Sequence[Part], recipe: Recipe, rank: int | None) -> list[LowRank]:
    """Combine LoRA, weight by weight."""
    weights = []
    for items in zip(*(part.prepared.built for part in parts), strict=True):
        first = items[0]
        if not isinstance(first.adapter, LoRA):
            continue
        require(
            recipe.keeps_low_rank or rank is not None,
            f"how={recipe.how!r} leaves changes of no low rank: pass rank= for the nearest LoRA of it.",
        )
        prefix = f"{first.site.name}.adapters.{first.name}.".lstrip(".")
        of_files, keys = [], set[str]()
        for part, item in zip(parts, items, strict=True):
            own = {key: part.tensors[prefix + key] for key in state_of(item.adapter)}
            keys.update(own)
            of_files.append(products_of(item.adapter, own))
        cuts = []
        for number, products in enumerate(zip(*of_files, strict=True)):
            cuts.append(combined(f"{prefix}{number}", products, recipe, rank))
        dtype = parts[0].tensors[f"{prefix}up"].dtype
        weights.append(LowRank(first.site.name, prefix, tuple(keys), dtype, cuts))
    return weights


def tensors_of_lora(planned: Plan, low_rank: Sequence[LowRank]) -> dict[str, Tensor]:
    """Write combined LoRA as the tensors of the planned adapters, by their names in a file."""
    tensors = {}
    for item in low_rank:
        rank = at(planned.record.methods["lora"], item.layer)["rank"]
        for key, tensor in tensors_of([cut.product for cut in item.cuts], rank).items():
            tensors[item.prefix + key] = tensor.to(item.dtype)
    return tensors


def relative_error(low_rank: Sequence[LowRank]) -> float:
    """Compute what the rank left out of all changes together: ‖ΔW − B·A‖ / ‖ΔW‖."""
    lost, whole = 0.0, 0.0
    for item in low_rank:
        lost += sum(cut.lost for cut in item.cuts)
        whole += sum(cut.whole for cut in item.cuts)
    if whole == 0:
        return 0.0
    return float((lost / whole) ** 0.5)
