"""What an attention is made of: the projections of queries, keys, values and outputs, fused or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .rows import Rows

_ATTENTION = re.compile(r"(Attention|Attn|SABlock)$")


_QUERY = ("q", "q_proj", "query", "to_q", "wq", "add_q_proj")


_KEY = ("k", "k_proj", "key", "to_k", "wk", "add_k_proj")


_VALUE = ("v", "v_proj", "value", "to_v", "wv", "add_v_proj")


_OUT = ("proj", "o_proj", "out_proj", "to_out.0", "output", "projection", "to_add_out", "to_out", "attn_out_proj")


_FUSED = {
    "qkv": ("q", "k", "v"),
    "to_qkv": ("q", "k", "v"),
    "qkvs": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "pwise": ("q", "k", "v"),  # LowFormer
    "in_proj": ("q", "k", "v"),
    "kv": ("k", "v"),
    "to_kv": ("k", "v"),
    "qk": ("q", "k"),
}


_SEPARATE = {name: part for part, names in zip("qkv", (_QUERY, _KEY, _VALUE), strict=True) for name in names}


_PROJECTIONS = {*_FUSED, *_SEPARATE, "in_proj_weight", "q_proj_weight"}


@dataclass(frozen=True)
class Projection:
    """One weight of an attention layer: `path` below it, the weight's and bias's names, the parts it makes."""

    path: str
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[Rows, ...] = ()
    part: str = ""

    @property
    def parts(self) -> str:
        """Letters of what the weight computes, of q, k, v and o."""
        return self.part or "".join(row.part for row in self.rows)


def projections(layer: nn.Module) -> list[Projection]:
    """The query, key, value and output projections of an attention layer; empty where it is none."""
    if not _PROJECTIONS & (layer._modules.keys() | layer._parameters.keys()):
        return []
    found = [*_own_projections(layer), *_fused_projections(layer), *_separate_projections(layer)]
    needed = "kv" if _global_query(layer) else "qkv"
    if not set(needed) <= set("".join(p.parts for p in found)):
        return []
    return found + _output_projection(layer)


def _global_query(layer: nn.Module) -> bool:
    """Whether the queries come from elsewhere, as in every other block of GCViT."""
    return bool(getattr(layer, "use_global", False))


def _own_projections(layer: nn.Module) -> Iterator[Projection]:
    """Weights that an attention layer owns itself, as `nn.MultiheadAttention` does."""
    fused = layer._parameters.get("in_proj_weight")
    if fused is not None:
        size = fused.shape[0] // 3
        rows = tuple(Rows(part, i * size, size) for i, part in enumerate("qkv"))
        yield Projection("", "in_proj_weight", "in_proj_bias", rows)
    for part in "qkv":
        if layer._parameters.get(f"{part}_proj_weight") is not None:
            yield Projection("", f"{part}_proj_weight", "", part=part)


def _fused_projections(layer: nn.Module) -> Iterator[Projection]:
    for name, parts in _FUSED.items():
        if name == "qkv" and _global_query(layer):
            parts = ("k", "v")
        child = layer._modules.get(name)
        # EfficientViT (MSRA) has a list of them, one a head.
        heads = [f"{name}.{i}" for i in range(len(child))] if isinstance(child, nn.ModuleList) else [name]
        for path in (found for head in heads for found in _matmul(layer, head)):
            rows = _layout(layer, layer.get_submodule(path), parts)
            if rows:
                yield Projection(path, rows=rows)


def _separate_projections(layer: nn.Module) -> Iterator[Projection]:
    for name, part in _SEPARATE.items():
        for path in _matmul(layer, name):
            yield Projection(path, part=part)


def _output_projection(layer: nn.Module) -> list[Projection]:
    found = (path for name in _OUT for path in _matmul(layer, name))
    return [Projection(path, part="o") for path in found][:1]


def _matmul(layer: nn.Module, path: str) -> list[str]:
    """Path of the Linear or convolution at `path`, the last one of several below it; empty where there is none."""
    child: nn.Module | None = layer
    for step in path.split("."):
        child = child._modules.get(step) if child is not None else None
    if child is None or isinstance(child, nn.ModuleList):
        return []
    # Of several, those before the last reduce the tokens: MobileNetV4's `down_conv`, EfficientFormerV2's `local`.
    inside = [p for p, m in child.named_modules() if isinstance(m, (nn.Linear, _ConvNd))]
    return [f"{path}.{inside[-1]}".rstrip(".")] if inside else []


def _layout(attention: nn.Module, projection: nn.Module, parts: tuple[str, ...]) -> tuple[Rows, ...]:
    """Which output channels of a fused projection make which part; empty where that is not known."""
    weight = getattr(projection, "weight")  # noqa: B009 - typed as Any
    sizes, groups = _part_sizes(attention, parts, weight.shape[0])
    first = weight.shape[0] // max(groups, 1) - sum(sizes)
    if not sizes or first < 0 or (first and not hasattr(attention, "in_split")):
        return ()
    starts = [first + sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Rows(*row, groups) for row in zip(parts, starts, sizes, strict=True))


def _part_sizes(attention: nn.Module, parts: tuple[str, ...], channels: int) -> tuple[list[int], int]:
    """Sizes of the parts within each of `groups` blocks of channels (heads, where heads come first)."""
    own: Any = attention
    heads = getattr(attention, "num_heads", 1)
    if hasattr(attention, "in_split"):  # ViT-22B: [MLP, q, k, v]
        return list(own.in_split[-len(parts) :]), 1
    if parts == ("q", "k", "v") and hasattr(attention, "dim_out_qk"):  # BoTNet; HaloNet's kv comes head by head
        return [own.dim_out_qk, own.dim_out_qk, own.dim_out_v], 1
    if hasattr(attention, "dim_qk") and hasattr(attention, "dim_v"):  # LambdaNet: one key and one value for all heads
        return [heads * own.dim_qk, own.dim_qk, own.dim_v], 1
    for key, value in (
        ("key_dim", "val_dim"),  # LeViT, EfficientFormer, TinyViT: [head][q, k, v]; EfficientViT (MSRA): one head each
        ("dim_head_qk", "dim_head_v"),  # HaloNet: [head][k, v]
        ("qk_dim", "pdim"),  # SHViT: one head
    ):
        if hasattr(attention, key) and hasattr(attention, value):
            size = {"q": getattr(attention, key), "k": getattr(attention, key), "v": getattr(attention, value)}
            sizes = [size[part] for part in parts]
            return sizes, heads if heads * sum(sizes) == channels else 1
    if type(attention).__name__ == "LinearSelfAttention":  # MobileViT v2: one query channel
        return [1, (channels - 1) // 2, (channels - 1) // 2], 1
    if type(attention).__name__ == "LiteMLA":  # EfficientViT (MIT): [head][q, k, v]
        return [own.dim] * 3, channels // (3 * own.dim)
    head_by_head = getattr(attention, "head_first", False) or hasattr(attention, "num_keys")  # CoAtNet, MaxViT; LowFormer
    groups = heads if head_by_head else 1
    return [channels // groups // len(parts)] * len(parts), groups


def is_attention(layer: nn.Module) -> bool:
    """Whether the layer owns the projections of an attention."""
    return bool(projections(layer))


def is_attention_shell(layer: nn.Module) -> bool:
    """Whether a module around an attention belongs to it, as Hugging Face's ViTAttention does."""
    return bool(_ATTENTION.search(type(layer).__name__))
