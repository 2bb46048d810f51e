"""How what enters a layer spreads around its mean: the directions in which it varies most."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import MedpeftError, require


class Spread:
    """Mean and scatter of rows that come batch by batch, exact however they are divided into batches.

    It holds one square matrix of as many columns as the rows have.

    Args:
        name: Of the layer, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name, self.count = name, 0
        self.mean = self.scatter = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Add the vectors of one batch, (…, C)."""
        rows = x.detach().reshape(-1, x.shape[-1])  # (B, N, C) → (B·N, C)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not len(rows):
            return
        mean = rows.mean(0)
        centred = rows - mean
        scatter = centred.mT @ centred
        if self.count:
            step, total = mean - self.mean, self.count + len(rows)
            mean = self.mean + step * (len(rows) / total)
            scatter = self.scatter + scatter + torch.outer(step, step) * (self.count * len(rows) / total)
        self.mean, self.scatter, self.count = mean, scatter, self.count + len(rows)

    def directions(self, rank: int) -> Tensor:
        """Find the `rank` directions of largest variance, orthonormal rows (rank, C), the largest first.

        Of the two signs of each, the largest element is positive.

        Raises:
            MedpeftError: the rows vary in fewer directions, or hold infinities or NaN.
        """
        require(
            self.count > 0,
            f"Nothing entered {self.name} while the model ran on the data: exclude it, or give other data.",
        )
        if not self.scatter.isfinite().all():
            raise MedpeftError(f"What enters {self.name} is not finite on the data.")
        variances, vectors = torch.linalg.eigh(self.scatter.double().cpu())
        smallest = variances[-1] * len(variances) * torch.finfo(self.scatter.dtype).eps
        varied = int((variances > smallest).sum())
        require(
            varied >= rank,
            f"What enters {self.name} varies in {varied} directions on the data, and rank={rank} needs as "
            "many: give more data, or a smaller rank.",
        )
        leading = vectors[:, -rank:].mT.flip(0)  # (C, rank), the smallest first → (rank, C)
        largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
        directions: Tensor = leading * largest.sign()
        return directions
