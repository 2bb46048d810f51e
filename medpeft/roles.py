"""What a layer is: convolution, norm, attention, MLP. Decided here, by type and structure, once for all methods."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

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
    r"Bottle|Residual|DenseLayer|MBConv|MbConv|CNBlock|ConvNe?Xt\w*Layer|BasicLayer|DepthwiseSeparable"
    r"|Block(2D|2d|1D|3D|V2|v2)?$|BasicBlock"
)
_NOT_BODY = re.compile(r"(stem|downsampl|shortcut|skip|patch_embed|embedder|upsampl|residual$|transition)")

_QUERY = ("q", "q_proj", "query", "to_q", "wq", "add_q_proj")
_KEY = ("k", "k_proj", "key", "to_k", "wk", "add_k_proj")
_VALUE = ("v", "v_proj", "value", "to_v", "wv", "add_v_proj")
_OUT = ("proj", "o_proj", "out_proj", "to_out.0", "output", "projection", "to_add_out", "to_out")
_FUSED = {
    "qkv": ("q", "k", "v"),
    "to_qkv": ("q", "k", "v"),
    "qkv_proj": ("q", "k", "v"),
    "in_proj": ("q", "k", "v"),
    "kv": ("k", "v"),
    "to_kv": ("k", "v"),
    "qk": ("q", "k"),
}
_SEPARATE = {name: part for part, names in zip("qkv", (_QUERY, _KEY, _VALUE), strict=True) for name in names}


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
    own = list(layer.parameters(recurse=False))
    nested = sum(1 for _ in layer.parameters()) > len(own)
    named = any("Norm" in name for name in class_names(layer))
    return named and bool(own) and not nested and all(p.numel() == max(p.shape, default=1) for p in own)


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
    channels_first = re.compile(r"Norm(1d|2d|3d|Act|1)$|ConvNe?Xt\w*LayerNorm$|Norm(Act)?[23]d\w*$")
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
    found = [*_own_projections(layer), *_fused_projections(layer), *_separate_projections(layer)]
    if not set("qkv") <= set("".join(p.parts for p in found)):
        return []
    return found + [Projection(path, part="o") for path in _first_matmul(layer, _OUT)]


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
        for path in _first_matmul(layer, (name,)):
            rows = _layout(layer, layer.get_submodule(path), parts)
            if rows:
                yield Projection(path, rows=rows)


def _separate_projections(layer: nn.Module) -> Iterator[Projection]:
    for name, part in _SEPARATE.items():
        for path in _first_matmul(layer, (name,)):
            yield Projection(path, part=part)


def _first_matmul(layer: nn.Module, names: tuple[str, ...]) -> list[str]:
    """Path of the Linear or convolution under the first of `names` that exists and holds exactly one."""
    for name in names:
        child: nn.Module | None = layer
        for step in name.split("."):
            child = child._modules.get(step) if child is not None else None
        if child is None:
            continue
        inside = [p for p, m in child.named_modules() if isinstance(m, (nn.Linear, _ConvNd))]
        if len(inside) == 1:
            return [f"{name}.{inside[0]}".rstrip(".")]
    return []


def _layout(attention: nn.Module, projection: nn.Module, parts: tuple[str, ...]) -> tuple[Rows, ...]:
    """Which output channels of a fused projection make which part; empty where that is not known."""
    weight = getattr(projection, "weight")  # noqa: B009 - typed as Any
    channels, heads = weight.shape[0], getattr(attention, "num_heads", 1)
    sizes, groups = _part_sizes(attention, parts, channels, heads)
    if sum(sizes) * groups != channels:
        return ()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Rows(*row, groups) for row in zip(parts, starts, sizes, strict=True))


def _part_sizes(attention: nn.Module, parts: tuple[str, ...], channels: int, heads: int) -> tuple[list[int], int]:
    """Sizes of the parts within each of `groups` blocks of channels (heads, where heads come first)."""
    for key, value, groups in (
        ("key_dim", "val_dim", heads),  # LeViT, EfficientFormer, TinyViT: [head][q, k, v]
        ("dim_head_qk", "dim_head_v", heads),  # HaloNet: [head][k, v]
        ("dim_out_qk", "dim_out_v", 1),  # BoTNet
        ("qk_dim", "pdim", 1),  # SHViT
    ):
        if hasattr(attention, key) and hasattr(attention, value):
            size = {"q": getattr(attention, key), "k": getattr(attention, key), "v": getattr(attention, value)}
            return [size[part] for part in parts], groups
    if type(attention).__name__ == "LinearSelfAttention":  # MobileViT v2: one query channel
        return [1, (channels - 1) // 2, (channels - 1) // 2], 1
    if type(attention).__name__ == "LiteMLA":  # EfficientViT: [head][q, k, v]
        return [int(getattr(attention, "dim"))] * 3, channels // (3 * int(getattr(attention, "dim")))  # noqa: B009
    if parts == ("q", "k", "v") and getattr(attention, "use_global", False):  # GCViT: global queries
        return [], 1
    groups = heads if getattr(attention, "head_first", False) else 1  # CoAtNet, MaxViT
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
