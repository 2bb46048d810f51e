"""A matrix as other libraries' files hold it: whole, or as a product of two factors, or of three."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Product:
    """up·down; with a core in between, which keeps the kernel of a convolution (Tucker's form).

    Attributes:
        up: (out, r).
        down: (r, fan-in); with a core (r, in).
        core: (r, r, kernel …), or None.
    """

    up: Tensor
    down: Tensor
    core: Tensor | None = None

    @property
    def rank(self) -> int:
        """r, by the second factor."""
        return self.down.shape[0]

    def without_core(self) -> Product:
        """Multiply a core into the second factor: the same product of the same rank."""
        if self.core is None:
            return self
        columns = torch.einsum("ij...,jp->ip...", self.core, self.down)
        return Product(self.up, columns.flatten(1))  # (r, in, kernel …) → (r, fan-in)


def rank_of(value: Tensor | Product) -> int:
    """r of a product; 0 of a whole matrix."""
    if isinstance(value, Product):
        return value.rank
    return 0


def multiplied(value: Tensor | Product) -> Tensor:
    """Multiply out what may be a product: (out, fan-in)."""
    if isinstance(value, Tensor):
        return value.flatten(1)  # (out, in, kernel …) → (out, fan-in)
    plain = value.without_core()
    return plain.up @ plain.down


def fits(value: Tensor | Product, rows: int, columns: int, kernel: tuple[int, ...]) -> bool:
    """Whether a matrix, or a product's factors, make (rows, columns, kernel …). Nothing is multiplied."""
    fan_in = columns * math.prod(kernel)
    if isinstance(value, Tensor):
        return value.ndim >= 2 and len(value) == rows and value.numel() == rows * fan_in
    rank = value.rank
    if tuple(value.up.shape) != (rows, rank):
        return False
    if value.core is None:
        return tuple(value.down.shape) == (rank, fan_in)
    same_kernel = without_ones(value.core.shape) == without_ones((rank, rank, *kernel))
    return same_kernel and tuple(value.down.shape) == (rank, columns)


def without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Leave out axes of length 1 after the second: a 1×1 kernel is a matrix in some files."""
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def described(value: Tensor | Product) -> str:
    """Name the shapes of a matrix or of the factors of a product."""
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    factors = [tuple(value.up.shape), tuple(value.down.shape)]
    if value.core is not None:
        factors.insert(1, tuple(value.core.shape))
    return "·".join(map(str, factors))


def put(target: Tensor, values: Tensor, *, factor: float = 1.0, clear: bool = False) -> None:
    """Write values, times a factor, into the first rows and columns of a parameter of any larger rank.

    `clear` sets the rest to 0; else it keeps its random start, so that what is filled up can train.
    """
    if clear:
        target.zero_()
    rows, columns = values.shape[:2]
    # (r, r, kernel, 1) → (r, r, kernel) where a file has more axes than the layer
    target[:rows, :columns] = values.to(target).view(rows, columns, *target.shape[2:]) * factor
