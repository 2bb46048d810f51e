"""LoRA of one layer as other libraries write it: one A and one B for the whole layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import weight_name
from ..architecture.convolution import slides_plainly
from ..architecture.layers import outputs_first
from ..architecture.network import Network
from ..architecture.rows import Rows
from ..architecture.site import Site
from ..checkpoint.save import plain
from ..formulas.lora import LoRA
from ..sharding import whole


@dataclass(frozen=True, eq=False)
class Factors:
    """LoRA of a whole layer: its weight changes by scale·B·A.

    Attributes:
        A: (r, fan-in), or (r, channels, kernel …) for a convolution.
        B: (out, r), or (out, r, 1 …) for a convolution.
        scale: The factor of the product.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """r, summed over the parts of a fused projection."""
        return self.A.shape[0]


def inexpressible(network: Network, name: str, adapter: nn.Module) -> str:
    """Say why peft cannot compute what the adapter of a layer does; "" if it can, or if it is no LoRA."""
    layer: Any = network.modules[name]
    if not isinstance(adapter, LoRA):
        return ""
    if adapter.magnitude is not None:
        return "DoRA is not written"
    if adapter.bias is not None:
        return "a bias of its own is not written: use bias=False"
    if adapter.kind not in ("linear", "conv"):
        return f"{type(layer).__name__} is no Linear and no convolution"
    if weight_name(adapter) != "weight" or network.readers(network.modules[name], "weight", "bias"):
        return "other code reads its weight without calling it, so that peft's wrapper would not act"
    if adapter.kind == "conv":
        return _ignored_by_peft(layer)
    return ""


def _ignored_by_peft(layer: Any) -> str:
    """Say what of a convolution peft's own convolutions leave out; "" if nothing."""
    ignored = []
    if layer.groups != 1:
        ignored.append("groups")
    if layer.padding_mode != "zeros":
        ignored.append("padding_mode")
    if set(layer.dilation) != {1}:
        ignored.append("dilation")
    if not slides_plainly(layer):
        ignored.append("what this class does to its weight or input")
    if not ignored:
        return ""
    return f"peft's convolutions ignore {' and '.join(ignored)}"


def factors_of(layer: nn.Module, adapter: LoRA) -> Factors:
    """Write an adapter as one A and one B of its whole layer.

    Each part of a fused projection has its own A. These are stacked, and B is block-diagonal. PiSSA and OLoRA
    get a second block, which takes off the product they started from.
    """
    own: Any = layer._parameters["weight"]
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
    return Factors(plain(A), plain(B), float(adapter.scale))


@torch.no_grad()
def fill(adapter: LoRA, site: Site, factors: Factors) -> None:
    """Put A and B into an adapter.

    If its rank is larger, the other rows of its A keep their random start, the other columns of its B are 0.
    """
    A = factors.A.flatten(1)  # (r, channels, kernel …) → (r, fan-in)
    B = factors.B.flatten(1) * factors.scale  # (out, r, 1 …) → (out, r)
    by_part = _channels_by_part(adapter.rows, len(B))
    adapter.up.zero_()
    row = 0
    for part, (indices, columns) in enumerate(zip(by_part, columns_by_part(factors, site), strict=True)):
        first = part * adapter.rank
        adapter.down[first : first + len(columns)] = A[columns].to(adapter.down)
        adapter.up[row : row + len(indices), : len(columns)] = B[indices][:, columns].to(adapter.up)
        row += len(indices)


def changed_parts(factors: Factors, site: Site) -> str:
    """Letters of the parts of a layer that B changes; all of them if it changes none."""
    B = factors.B.flatten(1)  # (out, r, 1 …) → (out, r)
    if len(B) != site.host.shape[0]:
        return site.parts
    changed = ""
    for row in site.rows:
        if B[row.indices(len(B))].any():
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


def misshapen(factors: Factors, site: Site) -> str:
    """Say why A and B do not fit a layer; "" if they do."""
    host = site.host
    shape_a = (factors.rank, *host.shape[1:])
    shape_b = (host.shape[0], factors.rank, *[1] * (host.ndim - 2))
    in_file = tuple(factors.A.shape), tuple(factors.B.shape)
    if in_file != (shape_a, shape_b):
        return f"A {in_file[0]} and B {in_file[1]} in the file, {shape_a} and {shape_b} fit the layer"
    if not factors.A.is_floating_point() or not factors.B.is_floating_point():
        return f"A and B are {factors.A.dtype} and {factors.B.dtype}"
    if site.rows and _changes_beside(factors.B, site.rows):
        return "the file changes rows of the layer that are neither query, key nor value"
    return ""


def _changes_beside(B: Tensor, rows: Sequence[Rows]) -> bool:
    """Whether B changes channels that belong to none of the parts."""
    beside = torch.ones(len(B), dtype=torch.bool)
    for row in rows:
        beside[row.indices(len(B))] = False
    return bool(B[beside].any())


def _channels_by_part(rows: Sequence[Rows], channels: int) -> list[list[int]]:
    """List the output channels of every part; of a layer without parts, all channels."""
    if not rows:
        return [list(range(channels))]
    return [row.indices(channels) for row in rows]
