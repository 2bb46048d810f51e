"""Fused projections: one weight that makes several of queries, keys and values (q, k, v).

`FUSED_LAYOUTS` lists how each family of models orders the output channels. To support another order, add a
row; for a layer of a new name, add the name in attention.py too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from .layers import any_tensor
from .rows import Rows


@dataclass(frozen=True)
class Split:
    """Split of the output channels of a fused projection into its parts.

    Attributes:
        sizes: Channels of each part within a group.
        groups: Equal groups of channels: the heads, where each head has all of its parts together.
        before: Channels of something else at the start of a group.
    """

    sizes: list[int]
    groups: int = 1
    before: int = 0

    @property
    def channels(self) -> int:
        """Channels in all."""
        return self.groups * (self.before + sum(self.sizes))

    def rows(self, parts: str) -> tuple[Rows, ...]:
        """Output channels of each part."""
        rows = []
        start = self.before
        for part, size in zip(parts, self.sizes, strict=True):
            rows.append(Rows(part, start, size, self.groups))
            start += size
        return tuple(rows)


@dataclass(frozen=True)
class FusedLayout:
    """Order of the output channels of fused projections in one family of attentions.

    Attributes:
        families: Models with such attentions.
        order: Order of the channels in words; `[head]` says that every head has all of its parts together.
        link: Source that shows the order.
        split: The sizes, from the attention, the parts of its projection and the projection's channels.
        attributes: Attributes that are set in attentions of the family and in no others.
        class_name: Name of their class, where no attribute tells; "" for any.
        parts: Letters of the parts in their order, where that is another than the projection's name says;
            else "".
    """

    families: str
    order: str
    link: str
    split: Callable[[Any, str, int], Split]
    attributes: tuple[str, ...] = ()
    class_name: str = ""
    parts: str = ""

    def fits(self, attention: nn.Module) -> bool:
        """Whether an attention is of this family."""
        if self.class_name not in ("", type(attention).__name__):
            return False
        return all(getattr(attention, attribute, None) for attribute in self.attributes)


def equal_parts(parts: str, channels: int, *, heads: int = 1) -> Split:
    """Split the channels, or those of each head, into parts of one size."""
    return Split([channels // heads // len(parts)] * len(parts), groups=heads)


def _per_head(attention: Any, parts: str, channels: int, *, key: str, value: str) -> Split:
    """Split by heads; `key` and `value` name the attributes with the sizes of q and k, and of v."""
    names = {"q": key, "k": key, "v": value}
    sizes = [getattr(attention, names[part]) for part in parts]
    heads = getattr(attention, "num_heads", 1)
    if heads * sum(sizes) != channels:
        return Split(sizes)
    return Split(sizes, groups=heads)


_TIMM = "https://github.com/huggingface/pytorch-image-models/blob/main/timm"

# The first row that fits an attention holds.
FUSED_LAYOUTS = (
    FusedLayout(
        families="GCViT, where the queries come from outside the attention",
        order="[k, v]",
        link=f"{_TIMM}/models/gcvit.py",
        attributes=("use_global",),
        parts="kv",
        split=lambda attention, parts, channels: equal_parts(parts, channels),
    ),
    FusedLayout(
        families="ViT-22B: timm's parallel blocks",
        order="[MLP, q, k, v]",
        link=f"{_TIMM}/models/vision_transformer.py",
        attributes=("in_split",),
        split=lambda attention, parts, channels: Split(attention.in_split[1:], before=attention.in_split[0]),
    ),
    FusedLayout(
        families="BoTNet",
        order="[q, k, v], where v may be wider",
        link=f"{_TIMM}/layers/bottleneck_attn.py",
        attributes=("qkv", "dim_out_qk", "dim_out_v"),
        split=lambda attention, parts, channels: Split([attention.dim_out_qk] * 2 + [attention.dim_out_v]),
    ),
    FusedLayout(
        families="LambdaNet",
        order="[q of all heads, k, v]: the heads share one key and one value",
        link=f"{_TIMM}/layers/lambda_layer.py",
        attributes=("num_heads", "dim_qk", "dim_v"),
        split=lambda attention, parts, channels: Split(
            [attention.num_heads * attention.dim_qk, attention.dim_qk, attention.dim_v]
        ),
    ),
    FusedLayout(
        families="LeViT, EfficientFormer, TinyViT; EfficientViT (MSRA), with a projection for each head",
        order="[head][q, k, v], where v may be wider",
        link=f"{_TIMM}/models/levit.py",
        attributes=("key_dim", "val_dim"),
        split=partial(_per_head, key="key_dim", value="val_dim"),
    ),
    FusedLayout(
        families="HaloNet",
        order="[head][k, v]",
        link=f"{_TIMM}/layers/halo_attn.py",
        attributes=("dim_head_qk", "dim_head_v"),
        split=partial(_per_head, key="dim_head_qk", value="dim_head_v"),
    ),
    FusedLayout(
        families="SHViT",
        order="[q, k, v] of its only head",
        link=f"{_TIMM}/models/shvit.py",
        attributes=("qk_dim", "pdim"),
        split=partial(_per_head, key="qk_dim", value="pdim"),
    ),
    FusedLayout(
        families="MobileViT v2",
        order="[one channel of q, k, v]",
        link=f"{_TIMM}/models/mobilevit.py",
        class_name="LinearSelfAttention",
        split=lambda attention, parts, channels: Split([1, (channels - 1) // 2, (channels - 1) // 2]),
    ),
    FusedLayout(
        families="EfficientViT (MIT)",
        order="[head][q, k, v]",
        link=f"{_TIMM}/models/efficientvit_mit.py",
        class_name="LiteMLA",
        attributes=("dim",),
        split=lambda attention, parts, channels: Split([attention.dim] * 3, channels // (3 * attention.dim)),
    ),
    FusedLayout(
        families="CoAtNet, MaxViT, if they say `head_first`",
        order="[head][q, k, v]",
        link=f"{_TIMM}/models/maxxvit.py",
        attributes=("head_first", "num_heads"),
        split=lambda attention, parts, channels: equal_parts(parts, channels, heads=attention.num_heads),
    ),
    FusedLayout(
        families="LowFormer",
        order="[head][q, k, v]",
        link=f"{_TIMM}/models/lowformer.py",
        attributes=("num_keys", "num_heads"),
        split=lambda attention, parts, channels: equal_parts(parts, channels, heads=attention.num_heads),
    ),
    FusedLayout(
        families="ViT, Swin, and all others",
        order="[q, k, v], [k, v] or [q, k] of equal sizes",
        link=f"{_TIMM}/models/vision_transformer.py",
        split=lambda attention, parts, channels: equal_parts(parts, channels),
    ),
)


def fused_rows(attention: nn.Module, projection: nn.Module, parts: str) -> tuple[Rows, ...]:
    """Output channels of every part of a fused projection; empty if its layout does not fit its size."""
    weight = any_tensor(projection, "weight")
    if weight is None:
        return ()
    channels = weight.shape[0]
    layout = next(layout for layout in FUSED_LAYOUTS if layout.fits(attention))
    parts = layout.parts or parts
    split = layout.split(attention, parts, channels)
    if len(split.sizes) != len(parts) or split.channels != channels:
        return ()
    return split.rows(parts)
