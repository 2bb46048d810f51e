"""What a layer is: convolution, norm, attention, MLP. Decided here, by type and structure, once for all methods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_ATTENTION = re.compile(r"(Attention|Attn|SABlock)$")
_MLP = re.compile(r"(Mlp|MLP|MLPBlock|FeedForward|FFN|Ffn|SwiGLU\w*|Intermediate)$")
_RESIDUAL = re.compile(
    r"Bottle|Residual|DenseLayer|MBConv|MbConv|CNBlock|ConvNe[Xx]t\w*Layer|BasicLayer|DepthwiseSeparable"
    r"|Block(2D|2d|1D|3D|V2|v2)?$|BasicBlock"
)
_NOT_BODY = re.compile(r"(stem|downsampl|shortcut|skip|patch_embed|embedder|upsampl|residual$|transition)")

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


def class_names(layer: nn.Module) -> list[str]:
    """The names of the layer's class and of its bases, most derived first."""
    return [cls.__name__ for cls in type(layer).__mro__ if cls not in (nn.Module, object)]


def is_conv(layer: nn.Module) -> bool:
    """Whether the layer is a convolution, transposed ones included."""
    return isinstance(layer, _ConvNd)


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer is a transposed convolution."""
    return isinstance(layer, _ConvTransposeNd)


def is_norm(layer: nn.Module) -> bool:
    """Whether the layer normalises: torch's norms, and any class called …Norm… that owns only vectors."""
    if isinstance(layer, NORMS):
        return True
    if not any("Norm" in name for name in class_names(layer)):
        return False
    own = list(layer.parameters(recurse=False))
    nested = sum(1 for _ in layer.parameters()) > len(own)
    return bool(own) and not nested and all(p.numel() == max(p.shape, default=1) for p in own)


def is_batchnorm(layer: nn.Module) -> bool:
    """Whether the layer normalises by statistics over the batch."""
    return isinstance(layer, _BatchNorm)


def is_layernorm(layer: nn.Module) -> bool:
    """Whether the layer is a LayerNorm, timm's and Hugging Face's channel-first ones included."""
    return is_norm(layer) and any("LayerNorm" in name for name in class_names(layer))


def erases_scale(layer: nn.Module) -> bool:
    """Whether the layer undoes a per-channel scale and shift of its input."""
    return isinstance(layer, (_BatchNorm, _InstanceNorm))


def is_scaling_norm(layer: nn.Module) -> bool:
    """Whether the norm ends in `weight * … + bias`, one of each per channel."""
    if not is_norm(layer) or not {"weight", "bias"} <= _own_tensors(layer):
        return False
    weight, bias = getattr(layer, "weight"), getattr(layer, "bias")  # noqa: B009 - typed as Any
    known = isinstance(layer, (_NormBase, nn.GroupNorm, nn.LayerNorm))
    known = known or any(re.search("(Layer|Batch|Group|Instance)Norm", name) for name in class_names(layer))
    return known and all(tensor is None or tensor.ndim == 1 for tensor in (weight, bias))


def _own_tensors(layer: nn.Module) -> set[str]:
    return {*layer._parameters, *layer._buffers}


def norm_channels(layer: nn.Module) -> int:
    """Number of channels of a norm, affine or not; 0 where its type does not say."""
    weight = {**layer._buffers, **layer._parameters}.get("weight")
    if isinstance(weight, Tensor):
        return weight.numel()
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[-1] if len(layer.normalized_shape) == 1 else 0
    return int(getattr(layer, "num_features", getattr(layer, "num_channels", 0)))


def channel_axis(layer: nn.Module) -> int:
    """Axis of the layer's output that holds its channels, from its type, never from matching sizes."""
    if isinstance(layer, (_ConvNd, _NormBase, nn.GroupNorm)):
        return 1
    if hasattr(layer, "data_format"):  # Hugging Face's ConvNextLayerNorm is both
        return 1 if layer.data_format == "channels_first" else -1
    channels_first = re.compile(r"Norm(1d|2d|3d|Act|1)$|Norm(Act)?[23]d\w*$")
    return 1 if is_norm(layer) and channels_first.search(type(layer).__name__) else -1


@dataclass(frozen=True)
class Rows:
    """Output channels of one part of a fused projection: `view(groups, total)[:, start:start + size]`."""

    part: str
    start: int
    size: int
    groups: int = 1

    def indices(self, channels: int) -> list[int]:
        """The part's output channels, of `channels` in all."""
        total = channels // self.groups
        return [g * total + self.start + i for g in range(self.groups) for i in range(self.size)]


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


def is_mlp(name: str, layer: nn.Module) -> bool:
    """Whether the module is the MLP of a transformer block, by its class or the last part of its name."""
    last = name.rsplit(".", 1)[-1]
    return bool(_MLP.search(type(layer).__name__)) or last in ("mlp", "ff", "ffn", "linear1", "linear2", "feed_forward")


def is_residual_block(layer: nn.Module) -> bool:
    """Whether the module is a block of a residual, dense or inverted-bottleneck network."""
    return bool(_RESIDUAL.search(type(layer).__name__))


def is_outside_body(name: str) -> bool:
    """Whether a layer of this name is a stem, a downsampling shortcut, or a patch embedding."""
    return bool(_NOT_BODY.search(name))


def in_body(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layer of that name lies in a residual block, its shortcut left out; `modules` are the model's by name."""
    steps = name.split(".")
    around = (".".join(steps[:i]) for i in range(1, len(steps)))
    return not is_outside_body(name) and any(is_residual_block(modules[n]) for n in around)
