"""VeRA: random matrices that never train, the same for all layers, and two vectors a layer that do.

Kopiczko, Blankevoort & Asano, "VeRA: Vector-based Random Matrix Adaptation" (ICLR 2024), arXiv 2310.11454,
Eq. 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.options import Count, Factor, Parts
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.rows import part_sizes, place_channels, replace_rows, take_rows
from ..architecture.site import Site
from .lora import LoRA


class RandomMatrix(nn.Module):
    """A frozen (rows, columns) matrix that a seed and its shape determine, bit for bit, wherever it is drawn.

    It is therefore part of no file. Its values are uniform within √(6 / columns), as He et al. (2015),
    arXiv 1502.01852, draw them.
    """

    matrix: Tensor

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        matrix = torch.empty(rows, columns, dtype=torch.float32)
        if not matrix.is_meta:
            matrix = _draw(rows, columns, seed)
        self.register_buffer("matrix", matrix, persistent=False)


def _draw(rows: int, columns: int, seed: int) -> Tensor:
    """Draw a matrix by a counter-based generator, Philox.

    NumPy fixes its stream for good, and torch promises nothing across versions and processors. Of the 24
    bits an element, no operation before the last rounds any away.
    """
    key = zlib.crc32(f"{seed}:{rows}x{columns}".encode())
    raw = np.random.Philox(key=key).random_raw(rows * columns)
    upper_bits = (raw >> np.uint64(40)).astype(np.float32)
    unit = torch.from_numpy(upper_bits) / 2**23 - 1
    bound = np.float32((6 / columns) ** 0.5).item()
    return (unit * bound).view(rows, columns)  # (rows·columns,) → (rows, columns)


@register(
    "vera",
    hint="without a target it adapts attentions or convolutions. Try 'lora' or 'ssf'.",
    search={"rank": (64, 256, 1024), "d_initial": (0.01, 0.1, 1.0)},
    by_image=True,
)
class VeRA(Adapter):
    """Frozen random matrices for all layers, scaled by two vectors per layer: W + diag(b)·B·diag(d)·A.

    A is (r, fan-in) and B (out, r), on the weight taken as a matrix. All weights with as many columns share
    A, all with as many rows share B. In a fused projection every adapted part has its own b and d. b starts
    at zero.

    Args:
        site: A linear layer or a convolution, or the `in_proj_weight` of an attention.
        rank: r.
        d_initial: Initial value of every element of d.
        projection_seed: Determines A and B, which a checkpoint leaves out; it holds this number among the
            options.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 256,
        d_initial: Factor = 0.1,
        projection_seed: int = 0,
    ) -> None:
        super().__init__(site)
        outputs, inputs = site.host.flatten(1).shape  # (out, in, …) → (out, fan-in)
        self.rank, self.rows = rank, site.rows
        sizes = part_sizes(site.rows, outputs)
        self.shared["down"] = _shared_matrix(site, rank, inputs, projection_seed)
        for i, size in enumerate(sizes):
            self.shared[f"up_{i}"] = _shared_matrix(site, size, rank, projection_seed)
        self.d = nn.Parameter(torch.full((rank * len(sizes),), float(d_initial)))
        self.b = nn.Parameter(torch.zeros(sum(sizes)))
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT

    @property
    def down(self) -> RandomMatrix:
        """A, which all weights with as many columns share."""
        return self.shared["down"]  # type: ignore[return-value]  # as it was made

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, parts: Parts = "qv") -> Iterator[Site]:
        """Yield LoRA's sites: the chosen parts (of q, k, v and o) of attentions; all convolutions of CNNs."""
        for site in LoRA.sites(network, targeted=targeted, parts=parts):
            if site.kind in ("linear", "conv"):
                yield site

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + b ⊙ B·(d ⊙ A·x), in the channels of the adapted parts."""
        hidden = F.linear(cast(x, self.d), self.down.matrix)
        changes = [F.linear(hidden * d, up) for d, up in self._parts()]
        change = _joined(changes, -1) * self.b
        return y + place_channels(change.to(y.dtype), self.rows, y, -1)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + diag(b)·B·diag(d)·A."""
        assert weight is not None
        change = _joined([(up * d) @ self.down.matrix for d, up in self._parts()], 0)
        matrix = weight.flatten(1)  # (out, in, …) → (out, fan-in)
        new_rows = take_rows(matrix, self.rows) + self.b[:, None] * change
        return replace_rows(matrix, self.rows, new_rows).view_as(weight), bias

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield d and B of each adapted part."""
        for i, d in enumerate(self.d.split(self.rank)):
            up: Any = self.shared[f"up_{i}"]
            yield d, up.matrix


def _joined(parts: list[Tensor], axis: int) -> Tensor:
    """Join the parts; a single one, of a layer that is not fused, is not copied."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, axis)


def _shared_matrix(site: Site, rows: int, columns: int, seed: int) -> RandomMatrix:
    return site.share((rows, columns), lambda: RandomMatrix(rows, columns, seed))
