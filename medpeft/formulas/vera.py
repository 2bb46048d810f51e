"""VeRA: random matrices that never train, the same for all layers, and two vectors a layer that do.

Kopiczko, Blankevoort & Asano, "VeRA: Vector-based Random Matrix Adaptation" (ICLR 2024), arXiv 2310.11454, Eq. 2.
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
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.rows import part_sizes, place_channels, replace_rows, take_rows
from ..architecture.site import Site
from ..errors import require_positive
from .lora import LoRA


class RandomMatrix(nn.Module):
    """A frozen (rows, columns) matrix that a seed and its shape determine, bit for bit, wherever it is drawn.

    Uniform within √(6 / columns), as He et al. (2015), arXiv 1502.01852, draw them. It is built of 24 bits an element from
    Philox, a counter-based generator whose stream NumPy fixes for good, by operations that round nothing before the last; torch
    promises neither across versions and processors. So it is no part of any file.
    """

    def __init__(self, rows: int, columns: int, seed: int) -> None:
        super().__init__()
        matrix = torch.empty(rows, columns, dtype=torch.float32)
        if not matrix.is_meta:
            raw = np.random.Philox(key=zlib.crc32(f"{seed}:{rows}x{columns}".encode())).random_raw(rows * columns)
            unit = torch.from_numpy((raw >> np.uint64(40)).astype(np.float32)) / 2**23 - 1
            matrix = (unit * np.float32((6 / columns) ** 0.5).item()).view(rows, columns)
        self.register_buffer("matrix", matrix, persistent=False)

    matrix: Tensor


@register(
    "vera",
    hint="without a target it adapts attentions or convolutions. Try 'lora' or 'ssf'.",
    search={"rank": (64, 256, 1024), "d_initial": (0.01, 0.1, 1.0)},
)
class VeRA(Adapter):
    """Frozen random matrices common to all layers, scaled by two small vectors a layer: W + diag(b)·B·diag(d)·A.

    A is (r, fan-in) and B (out, r), on the weight taken as a matrix; all weights with as many columns share A, all with as many
    rows share B. In a fused projection every adapted part has its own b and d. b starts at zero.

    Args:
        site: A linear layer or a convolution, or the `in_proj_weight` of an attention.
        rank: r.
        d_initial: What every element of d starts from.
        projection_seed: Determines A and B, which a checkpoint leaves out; it holds this number among the options.
    """

    def __init__(self, site: Site, *, rank: int = 256, d_initial: float = 0.1, projection_seed: int = 0) -> None:
        super().__init__(site)
        require_positive("rank", rank)
        outputs, inputs = site.host.flatten(1).shape
        self.rank, self.rows, self.sizes = rank, site.rows, part_sizes(site.rows, outputs)
        self.shared["down"] = self._shared_matrix(site, rank, inputs, projection_seed)
        for i, size in enumerate(self.sizes):
            self.shared[f"up_{i}"] = self._shared_matrix(site, size, rank, projection_seed)
        self.d = nn.Parameter(torch.full((rank * len(self.sizes),), float(d_initial)))
        self.b = nn.Parameter(torch.zeros(sum(self.sizes)))
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT

    @property
    def down(self) -> RandomMatrix:
        """A, which all weights with as many columns share."""
        return self.shared["down"]  # type: ignore[return-value]  # as it was made

    @staticmethod
    def _shared_matrix(site: Site, rows: int, columns: int, seed: int) -> RandomMatrix:
        return site.share((rows, columns), lambda: RandomMatrix(rows, columns, seed))

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, parts: str = "qv") -> Iterator[Site]:
        """As LoRA's: the chosen parts (of q, k, v and the output projection o) of every attention; all convolutions of CNNs."""
        return (site for site in LoRA.sites(network, targeted=targeted, parts=parts) if site.kind in ("linear", "conv"))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + b ⊙ B·(d ⊙ A·x), in the channels of the adapted parts."""
        hidden = F.linear(cast(x, self.d), self.down.matrix)
        parts = [F.linear(hidden * d, up) for d, up in self._each()]
        return y + place_channels((torch.cat(parts, -1) * self.b).to(y.dtype), self.rows, y, -1)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + diag(b)·B·diag(d)·A."""
        assert weight is not None
        change = torch.cat([(up * d) @ self.down.matrix for d, up in self._each()])
        matrix = weight.flatten(1)
        new = take_rows(matrix, self.rows) + self.b[:, None] * change
        return replace_rows(matrix, self.rows, new).view_as(weight), bias

    def _each(self) -> Iterator[tuple[Tensor, Tensor]]:
        """d and B of each part."""
        for i, d in enumerate(self.d.split(self.rank)):
            up: Any = self.shared[f"up_{i}"]
            yield d, up.matrix
