"""LoRA of one part of a layer as two matrices, and a change of the weight as LoRA of some rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..formulas.lora import LoRA
from .changes import Recipe


class UpDown(NamedTuple):
    """A change of the weight as up · down.

    Attributes:
        up: (out, r), in float64.
        down: (r, fan-in), in float64.
    """

    up: Tensor
    down: Tensor

    @property
    def rank(self) -> int:
        """r."""
        return self.up.shape[1]


class Fitted(NamedTuple):
    """A product of the rank that was asked for, and what it leaves out.

    Attributes:
        product: The product.
        lost: Sum of the squares of what is left out.
        whole: Sum of the squares of the whole change.
    """

    product: UpDown
    lost: float
    whole: float


def products_of(adapter: LoRA, tensors: Mapping[str, Tensor]) -> list[UpDown]:
    """Write what an adapter with these tensors adds to the weight, one product a part of a fused layer.

    What it started from, as PiSSA does, is a second block that is taken off.
    """
    products = []
    blocks = [("up", "down", adapter.scale)]
    if adapter.starts_from_weight:
        blocks.append(("up_start", "down_start", -adapter.scale))
    for part in range(len(adapter.sizes)):
        ups, downs = [], []
        for up, down, scale in blocks:
            ups.append(scale * tensors[up].double().split(adapter.sizes)[part])
            downs.append(tensors[down].double().split(adapter.rank)[part])
        products.append(UpDown(torch.cat(ups, 1), torch.cat(downs)))
    return products


def combined(name: str, products: Sequence[UpDown], recipe: Recipe, rank: int | None) -> Fitted:
    """Make one product of several.

    The sum of products is their concatenation, exactly. Of more than `rank` columns the largest singular
    values are kept, which is the nearest change of that rank.
    """
    if not recipe.keeps_low_rank:
        changes = [product.up @ product.down for product in products]
        change = recipe.combine(name, changes)
        assert rank is not None
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        return _fitted(left, values, right, rank)
    ups = []
    for weight, product in zip(recipe.weights, products, strict=True):
        ups.append(weight * product.up)
    up, down = torch.cat(ups, 1), torch.cat([product.down for product in products])
    if rank is None or rank >= up.shape[1]:
        # ‖up · down‖² without that matrix: the trace of (upᵀ · up) · (down · downᵀ), which are small.
        whole = (up.mT @ up * (down @ down.mT)).sum()
        return Fitted(UpDown(up, down), 0.0, float(whole.clamp(min=0)))
    # The singular values of up · down are those of the small matrix between two orthogonal ones.
    left, inner_left = torch.linalg.qr(up)
    right, inner_right = torch.linalg.qr(down.mT)
    u, values, vt = torch.linalg.svd(inner_left @ inner_right.mT, full_matrices=False)
    return _fitted(left @ u, values, vt @ right.mT, rank)


def _fitted(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Fitted:
    """Keep the first singular values, half of each in either matrix."""
    root = values[:rank].sqrt()
    product = UpDown(left[:, :rank] * root, root[:, None] * right[:rank])
    squares = values.square()
    return Fitted(product, float(squares[rank:].sum()), float(squares.sum()))


def tensors_of(products: Sequence[UpDown], rank: int) -> dict[str, Tensor]:
    """Write products as the tensors of an adapter of one rank and a factor of 1, filled up by zeros."""
    ups, downs = [], []
    for product in products:
        more = rank - product.rank
        ups.append(torch.nn.functional.pad(product.up, (0, more)))
        downs.append(torch.nn.functional.pad(product.down, (0, 0, 0, more)))
    return {"up": torch.cat(ups), "down": torch.cat(downs)}
