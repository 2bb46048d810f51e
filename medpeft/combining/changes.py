"""Changes of one tensor, from several files, made into one.

- "sum": Ilharco et al., "Editing Models with Task Arithmetic" (ICLR 2023), arXiv 2212.04089, Sec. 2.
- "ties": Yadav et al., "TIES-Merging: Resolving Interference When Merging Models" (NeurIPS 2023),
  arXiv 2306.01708, Sec. 4 and Algorithm 1.
- "dare": Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free
  Lunch" (ICML 2024), arXiv 2311.03099, Eq. 1 to 3.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

How = Literal["sum", "ties", "dare"]


@dataclass(frozen=True)
class Recipe:
    """The way in which changes become one.

    Attributes:
        how: "sum": Σ wᵢ·τᵢ. "ties": of each τᵢ the largest numbers; of these, at each place, the mean of all
            wᵢ·τᵢ whose τᵢ has the sign of the sum of all τᵢ, so that a change of weight 0 votes and counts.
            "dare": Σ wᵢ·τᵢ, each of a random part of its numbers, divided by the share that is left.
        weights: w, one for each change.
        density: Share of the numbers of each change that is kept.
        seed: Seed of the random parts.
    """

    how: How
    weights: tuple[float, ...]
    density: float
    seed: int

    @property
    def keeps_low_rank(self) -> bool:
        """Whether the rank of the result is at most the sum of the ranks."""
        return self.how == "sum"

    def combine(self, name: str, changes: Sequence[Tensor]) -> Tensor:
        """Make one change of several, in float64.

        Args:
            name: Name of the tensor. It is part of the seed, so that each tensor has its own random part.
            changes: The changes.
        """
        wide = [change.double() for change in changes]
        match self.how:
            case "ties":
                return self._disjoint_mean([self._trimmed(change) for change in wide])
            case "dare":
                wide = [self._dropped(change, f"{name}:{i}") for i, change in enumerate(wide)]
        total = torch.zeros_like(wide[0])
        for weight, change in zip(self.weights, wide, strict=True):
            total += weight * change
        return total

    def _trimmed(self, change: Tensor) -> Tensor:
        """Keep the numbers of largest magnitude, as many as the density says, and at least one."""
        flat = change.flatten()
        if not len(flat):
            return change
        kept = flat.abs().topk(max(1, int(self.density * len(flat)))).indices
        trimmed = torch.zeros_like(flat)
        trimmed[kept] = flat[kept]
        return trimmed.view_as(change)

    def _disjoint_mean(self, trimmed: Sequence[Tensor]) -> Tensor:
        """Elect a sign at every place, and take the mean of the weighted changes that have it."""
        total = torch.zeros_like(trimmed[0])
        for change in trimmed:
            total += change
        elected = total.sign()
        mean, count = torch.zeros_like(total), torch.zeros_like(total)
        for weight, change in zip(self.weights, trimmed, strict=True):
            agrees = (change.sign() == elected) & (change != 0)
            mean += torch.where(agrees, weight * change, 0.0)
            count += agrees
        return mean / count.clamp(min=1)

    def _dropped(self, change: Tensor, name: str) -> Tensor:
        """Keep a random part of the numbers, and make up for the others."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
        kept = torch.rand(change.shape, generator=generator, dtype=torch.float64) < self.density
        return torch.where(kept.to(change.device), change / self.density, 0.0)
