"""The projections of an attention: the layers that make queries, keys, values and outputs (q, k, v, o)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .fused import equal_parts, fused_rows
from .layers import any_tensor, child_at, is_conv
from .rows import Rows

_SHELL = re.compile(r"(Attention|Attn|SABlock)$")

# Names of projections in the libraries' attentions, with the parts that each makes.
_FUSED = {
    "qkv": "qkv",
    "to_qkv": "qkv",
    "qkvs": "qkv",
    "qkv_proj": "qkv",
    "pwise": "qkv",  # LowFormer
    "in_proj": "qkv",
    "kv": "kv",
    "to_kv": "kv",
    "qk": "qk",
}
_SEPARATE = {
    **dict.fromkeys(("q", "q_proj", "query", "to_q", "wq", "add_q_proj"), "q"),
    **dict.fromkeys(("k", "k_proj", "key", "to_k", "wk", "add_k_proj"), "k"),
    **dict.fromkeys(("v", "v_proj", "value", "to_v", "wv", "add_v_proj"), "v"),
}
_OUTPUT = (
    *("proj", "o_proj", "out_proj", "to_out.0", "output", "projection"),
    *("to_add_out", "to_out", "attn_out_proj"),
)
_PROJECTIONS = {*_FUSED, *_SEPARATE, "in_proj_weight", "q_proj_weight"}


@dataclass(frozen=True)
class Projection:
    """One weight of an attention.

    Attributes:
        path: Name of the layer that owns the weight, below the attention; "" for the attention itself.
        weight: Name of the weight.
        bias: Name of its bias.
        rows: Output channels of every part of a fused projection; empty for a separate one.
        part: Letter of what a separate projection makes (q, k, v or o).
    """

    path: str
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[Rows, ...] = ()
    part: str = ""

    @property
    def parts(self) -> str:
        """Letters of all that the weight makes."""
        return self.part or "".join(row.part for row in self.rows)

    def layer_in(self, attention: str) -> str:
        """Name of the layer that owns the weight, in a model that has the attention under a name."""
        return f"{attention}.{self.path}".strip(".")


def projections(attention: nn.Module) -> list[Projection]:
    """The query, key, value and output projections of an attention; empty for any other module."""
    has_projections = bool(_PROJECTIONS & (attention._modules.keys() | attention._parameters.keys()))
    if not has_projections and not isinstance(attention, nn.MultiheadAttention):
        return []
    makers = [*_own_projections(attention), *_fused_projections(attention), *_separate_projections(attention)]
    needed = set("kv" if _has_global_query(attention) else "qkv")
    for projection in makers:
        needed -= set(projection.parts)
    if needed:
        return []
    return [*makers, *_output_projection(attention)]


def is_attention(layer: nn.Module) -> bool:
    """Whether the layer owns the projections of an attention."""
    return bool(projections(layer))


def is_attention_shell(layer: nn.Module) -> bool:
    """Whether a module around an attention belongs to it, as Hugging Face's ViTAttention does."""
    return bool(_SHELL.search(type(layer).__name__))


def attends_for_class_token(block: nn.Module) -> bool:
    """Whether a block's attention asks for the class token alone, as in the last blocks of XCiT and CaiT."""
    return any("ClassAtt" in type(module).__name__ for module in block.modules())


def _has_global_query(attention: nn.Module) -> bool:
    """Whether the queries come from outside the attention, as in every other block of GCViT."""
    return bool(getattr(attention, "use_global", False))


def _own_projections(attention: nn.Module) -> Iterator[Projection]:
    """Weights that an attention owns itself, as `nn.MultiheadAttention` does."""
    fused = any_tensor(attention, "in_proj_weight")
    if fused is not None:
        rows = equal_parts("qkv", len(fused)).rows("qkv")
        yield Projection("", "in_proj_weight", "in_proj_bias", rows)
    for part in "qkv":
        if any_tensor(attention, f"{part}_proj_weight") is not None:
            yield Projection("", f"{part}_proj_weight", "", part=part)


def _fused_projections(attention: nn.Module) -> Iterator[Projection]:
    for name, parts in _FUSED.items():
        for place in _places(attention, name):
            path = _matmul(attention, place)
            if path is None:
                continue
            rows = fused_rows(attention, attention.get_submodule(path), parts)
            if rows:
                yield Projection(path, rows=rows)


def _places(attention: nn.Module, name: str) -> list[str]:
    """Paths of the fused projections of that name; EfficientViT (MSRA) has one for each head."""
    child = attention._modules.get(name)
    if isinstance(child, nn.ModuleList):
        return [f"{name}.{head}" for head in range(len(child))]
    return [name]


def _separate_projections(attention: nn.Module) -> Iterator[Projection]:
    for name, part in _SEPARATE.items():
        path = _matmul(attention, name)
        if path is not None:
            yield Projection(path, part=part)


def _output_projection(attention: nn.Module) -> list[Projection]:
    for name in _OUTPUT:
        path = _matmul(attention, name)
        if path is not None:
            return [Projection(path, part="o")]
    return []


def _matmul(attention: nn.Module, path: str) -> str | None:
    """Path of the linear layer or convolution at `path`, or of the last of several inside what is there."""
    child = child_at(attention, path)
    if child is None or isinstance(child, nn.ModuleList):
        return None
    last = None
    # Those before the last reduce the tokens: MobileNetV4's `down_conv`, EfficientFormerV2's `local`.
    for name, module in child.named_modules(prefix=path):
        if isinstance(module, nn.Linear) or is_conv(module):
            last = name
    return last
