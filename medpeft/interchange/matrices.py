"""LoRA of one layer as other libraries write it: one A and one B for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapters.adapter import weight_name
from ..architecture.layers import outputs_first
from ..architecture.rows import Rows, replace_rows, take_rows
from ..architecture.site import Site
from ..checkpoint.save import plain
from ..formulas.lora import LoRA
from ..sharding import whole
from .products import Product, described, fits, without_ones


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA of a whole layer: its weight changes by scale·B·A, and with a bias b its output by scale·b too.

    Attributes:
        A: (r, fan-in), or (r, channels, kernel …) for a convolution.
        B: (out, r), or (out, r, 1 …) for a convolution.
        scale: The factor of the product.
        magnitude: Norm of every output row, (out,), with DoRA; else None.
        core: (r, r, kernel …) between B and A, (r, channels), in Tucker's form of a convolution; else None.
        bias: b, (out,); None without one.
    """

    method: ClassVar[str] = "lora"
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None
    core: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        """r, summed over the parts of a fused projection."""
        return self.A.shape[0]

    def misshapen(self, site: Site) -> str:
        """Say why A and B do not fit a layer; "" if they do."""
        host = site.host
        shape_a = (self.rank, *host.shape[1:])
        shape_b = (host.shape[0], self.rank, *[1] * (host.ndim - 2))
        in_file = tuple(self.A.shape), tuple(self.B.shape)
        if self.core is not None:
            product = Product(self.B.flatten(1), self.A.flatten(1), self.core)
            if not fits(product, host.shape[0], host.shape[1], tuple(host.shape[2:])):
                return f"{described(product)} in the file does not make {tuple(host.shape)}"
        elif tuple(map(without_ones, in_file)) != (without_ones(shape_a), without_ones(shape_b)):
            return f"A {in_file[0]} and B {in_file[1]} in the file, {shape_a} and {shape_b} fit the layer"
        for what, vector in (("norms", self.magnitude), ("biases", self.bias)):
            if vector is not None and vector.shape != host.shape[:1]:
                return f"{tuple(vector.shape)} {what} in the file, {tuple(host.shape[:1])} rows in the layer"
        if site.rows and _changed_rows(self)[_beside(site.rows, host.shape[0])].any():
            return "the file changes rows of the layer that are neither query, key nor value"
        return ""

    @torch.no_grad()
    def fill(self, adapter: nn.Module, site: Site) -> None:
        """Put A and B into an adapter.

        If its rank is larger, the other rows of its A keep their random start, the other columns of its B
        are 0.
        """
        assert isinstance(adapter, LoRA)
        product = Product(self.B.flatten(1), self.A.flatten(1), self.core).without_core()
        A, B = product.down, product.up  # (r, fan-in), (out, r)
        by_part = _channels_by_part(adapter.rows, len(B))
        adapter.up.zero_()
        row = 0
        for part, (indices, columns) in enumerate(zip(by_part, columns_by_part(self, site), strict=True)):
            first = part * adapter.rank
            rows = slice(row, row + len(indices))
            adapter.down[first : first + len(columns)] = A[columns].to(adapter.down)
            adapter.up[rows, : len(columns)] = B[indices][:, columns].to(adapter.up) * self.scale
            row += len(indices)
        if adapter.magnitude is not None and self.magnitude is not None:
            adapter.magnitude.copy_(take_rows(self.magnitude, adapter.rows))
        if adapter.bias is not None and self.bias is not None:
            adapter.bias.copy_(take_rows(self.bias, adapter.rows).to(adapter.bias) * self.scale)


def factors_of(layer: nn.Module, adapter: LoRA) -> Factors:
    """Write an adapter as one A and one B of its whole layer.

    Each part of a fused projection has its own A. These are stacked, and B is block-diagonal. PiSSA and OLoRA
    get a second block, which takes off the product they started from. With DoRA, rows of no part keep their
    norm, and with a bias they get one of 0.
    """
    own: Any = layer._parameters[weight_name(adapter)]
    weight = outputs_first(layer, own)
    channels = weight.shape[0]
    downs, ups = [whole(adapter.down)], [whole(adapter.up)]
    if adapter.starts_from_weight:
        downs.append(whole(adapter.down_start))
        ups.append(-whole(adapter.up_start))
    A = torch.cat(downs)  # (r, fan-in)
    B = A.new_zeros(channels, A.shape[0])  # (out, r)
    by_part = _channels_by_part(adapter.rows, channels)
    first = 0
    for up in ups:
        blocks = up.split([len(indices) for indices in by_part])
        for indices, block in zip(by_part, blocks, strict=True):
            B[indices, first : first + adapter.rank] = block
            first += adapter.rank
    if adapter.kind == "conv":
        A = A.view(-1, *weight.shape[1:])  # (r, fan-in) → (r, channels, kernel …)
        B = B.view(*B.shape, *[1] * (weight.ndim - 2))  # (out, r) → (out, r, 1 …)
    magnitude = None
    if adapter.magnitude is not None:
        norms = _norms_of_rows(whole(weight).flatten(1))  # (out, in, …) → (out, fan-in)
        magnitude = plain(replace_rows(norms, adapter.rows, whole(adapter.magnitude).to(norms)))
    bias = None
    if adapter.bias is not None:
        zeros = A.new_zeros(channels)
        bias = plain(replace_rows(zeros, adapter.rows, whole(adapter.bias).to(zeros)))
    return Factors(plain(A), plain(B), float(adapter.scale), magnitude, bias=bias)


def _norms_of_rows(matrix: Tensor) -> Tensor:
    """Measure every row in float32 or wider."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norms


def changed_parts(factors: Factors, site: Site) -> str:
    """Letters of the parts of a layer that B or a bias changes; all if none is, and with DoRA."""
    if factors.magnitude is not None or not _has_rows_of(factors, site):
        return site.parts
    rows, changed = _changed_rows(factors), ""
    for row in site.rows:
        if rows[row.indices(len(rows))].any():
            changed += row.part
    return changed or site.parts


def columns_by_part(factors: Factors, site: Site) -> list[list[int]]:
    """List the columns of B that each part of a layer uses: its own block, where B is block-diagonal."""
    B = factors.B.flatten(1)  # (out, r, 1 …) → (out, r)
    every = list(range(factors.rank))
    if not site.rows or len(B) != site.host.shape[0]:
        return [every]
    used = []
    for row in site.rows:
        weights = B[row.indices(len(B))].abs().sum(0)  # (r,)
        used.append(torch.nonzero(weights).flatten().tolist())  # (columns, 1) → (columns,)
    if not any(used):
        return [every] * len(used)
    return used


def _has_rows_of(factors: Factors, site: Site) -> bool:
    """Whether B and the bias have a row for every output channel of a layer."""
    channels = site.host.shape[0]
    return len(factors.B) == channels and (factors.bias is None or len(factors.bias) == channels)


def _changed_rows(factors: Factors) -> Tensor:
    """Whether B or a bias changes each output channel, (out,)."""
    changed = factors.B.flatten(1).any(1)  # (out, r, 1 …) → (out, r) → (out,)
    if factors.bias is not None:
        changed = changed | (factors.bias != 0)
    return changed


def _beside(rows: Sequence[Rows], channels: int) -> Tensor:
    """Whether each output channel belongs to none of the parts, (out,)."""
    beside = torch.ones(channels, dtype=torch.bool)
    for row in rows:
        beside[row.indices(channels)] = False
    return beside


def _channels_by_part(rows: Sequence[Rows], channels: int) -> list[list[int]]:
    """List the output channels of every part; of a layer without parts, all channels."""
    if not rows:
        return [list(range(channels))]
    return [row.indices(channels) for row in rows]
