"""Every kind of place that a method may adapt, each as a model as small as can be."""

from functools import cache

import torch
import torch.nn.functional as F
from models import randomise
from mold import Mold
from torch import Tensor, nn

import medpeft


def attended(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Attention of several heads, (B, N, D)."""
    # (B, N, D) → (B, H, N, D / H)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    mixed = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(2)  # (B, H, N, D / H) → (B, N, D)


class Attention(nn.Module):
    """An attention with a fused projection."""

    def __init__(self, width: int = 8, heads: int = 2, bias: bool = True):
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width)

    def forward(self, x):
        return self.proj(attended(*self.qkv(x).chunk(3, -1), self.num_heads))


class ReadingAttention(Attention):
    """An attention that reads the weight of its projection without calling it, as timm's BEiT does."""

    def forward(self, x):
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias)
        return self.proj(attended(*qkv.chunk(3, -1), self.num_heads))


class SeparateAttention(nn.Module):
    """An attention with a projection each for queries, keys and values."""

    def __init__(self, width: int = 8, heads: int = 2, bias: bool = True):
        super().__init__()
        self.num_heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width, bias), nn.Linear(width, width, bias)
        self.v_proj, self.out_proj = nn.Linear(width, width, bias), nn.Linear(width, width, bias)

    def forward(self, x):
        return self.out_proj(attended(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.num_heads))


class TorchAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self, width: int = 8, heads: int = 2, bias: bool = True, **options):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True, **options)

    def forward(self, x):
        return self.attn(x, x[..., : self.attn.kdim], x[..., : self.attn.vdim])[0]


class Mlp(nn.Module):
    """Two layers of a transformer block."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A transformer block that normalises before its branches."""

    def __init__(self, width: int = 8, heads: int = 2, hidden: int = 12, attention: type = Attention):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Blocks in a row."""

    def __init__(self, depth: int = 1, **options):
        super().__init__()
        self.blocks = nn.Sequential(*[Block(**options) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(x)


class BasicBlock(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        hidden = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(hidden)) + x).relu()


def conv1d_of_transformers(inputs: int, outputs: int) -> nn.Module:
    """The linear layer of GPT-2, whose weight is (in, out)."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


TOKENS, IMAGES = (2, 4, 8), (2, 4, 4, 4)

PLACES = {
    "linear": (lambda: nn.Linear(8, 12), TOKENS),
    "linear without bias": (lambda: nn.Linear(8, 6, bias=False), TOKENS),
    "fused qkv": (Attention, TOKENS),
    "qkv that is read": (ReadingAttention, TOKENS),
    "separate q, k, v": (SeparateAttention, TOKENS),
    "MultiheadAttention": (TorchAttention, TOKENS),
    "MultiheadAttention of other widths": (lambda: TorchAttention(kdim=4, vdim=6), TOKENS),
    "conv 1-d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 5)),
    "conv 2-d": (lambda: nn.Conv2d(4, 4, 3, padding=1), IMAGES),
    "conv 2-d with stride": (lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False), IMAGES),
    "conv 2-d reflecting": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGES),
    "conv 1×1": (lambda: nn.Conv2d(4, 4, 1), IMAGES),
    "conv 3-d": (lambda: nn.Conv3d(4, 4, 3, padding=1), (1, 4, 3, 3, 3)),
    "grouped conv": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), IMAGES),
    "depthwise conv": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGES),
    "transposed conv": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2), IMAGES),
    "grouped transposed conv": (lambda: nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 3)),
    "embedding": (lambda: nn.Embedding(5, 4), None),
    "embedding with padding": (lambda: nn.Embedding(5, 4, padding_idx=1), None),
    "embedding with max_norm": (lambda: nn.Embedding(5, 4, max_norm=1.0), None),
    "LayerNorm": (lambda: nn.LayerNorm(8), TOKENS),
    "LayerNorm without weights": (lambda: nn.LayerNorm(8, elementwise_affine=False), TOKENS),
    "RMSNorm": (lambda: nn.RMSNorm(8), TOKENS),
    "BatchNorm": (lambda: nn.BatchNorm2d(4), IMAGES),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGES),
    "Conv1D of transformers": (lambda: conv1d_of_transformers(8, 6), TOKENS),
    "transformer": (Transformer, TOKENS),
    "residual block": (BasicBlock, IMAGES),
}
"""Every place by name: how to build its layer, and the shape of an input, None for indices."""

WHOLE = ("transformer", "residual block")
"""Places that a method adapts where its paper does, without a target."""

WITH_HEAD = ("LayerNorm without weights",)
"""Places with a head, which says what the dtype of the model is where the layer has no weights."""


@cache
def _mold(place: str, dtype: torch.dtype) -> Mold:
    make, _ = PLACES[place]
    model = nn.Sequential(make())
    if place in WITH_HEAD:
        model.append(nn.Linear(8, 2))
    return Mold(randomise(model.double()).to(dtype).eval())


def build(place: str, dtype: torch.dtype) -> nn.Module:
    """The layer of a place in a model, with random weights, the same each time, in eval mode."""
    return _mold(place, dtype).cast()


def apply_at(place: str, model: nn.Module, method: str | dict, /, **options) -> nn.Module:
    """Apply a method to the model of a place."""
    head, target = None, "*"
    if place in WITH_HEAD:
        head = "1"
    if place in WHOLE or place in WITH_HEAD:
        target = None
    asked = [options, *(method.values() if isinstance(method, dict) else ())]
    if place in PLACES and any(each.get("init") == "eva" for each in asked):
        options["data"] = [example(place, next(model.parameters()).dtype)]
    return medpeft.apply(model, method, head=head, target=target, **options)


def example(place: str, dtype: torch.dtype) -> Tensor:
    """An input for a place, the same each time."""
    _, shape = PLACES[place]
    if shape is None:
        return torch.tensor([[0, 1, 4], [2, 2, 3]])
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return drawn.to(dtype)
