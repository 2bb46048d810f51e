"""Single layers of every type with the methods that fit them, and a transformer block, for tests of their inputs."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

CONV = "bias bitfit conv_adapter full ia3 loha lokr lora residual_adapter shira ssf svdiff tsa vera"
ATTENTION = "attention bias bitfit difffit fact full ia3 loha lokr lora miss oft prefix repadapter shira ssf svdiff vera"
NORM = "bias bitfit full norm ssf svdiff"

# A layer, a batch that it takes, and the methods that fit it.
LAYERS = {
    "linear": (
        lambda: nn.Linear(6, 6),
        (3, 5, 6),
        "bias bitfit fact full ia3 loha lokr lora miss oft repadapter shira ssf svdiff vera",
    ),
    "linear, transposed": (
        lambda: Conv1D(8, 6),
        (3, 5, 6),
        "bias bitfit fact full ia3 loha lokr lora miss oft repadapter shira ssf svdiff vera",
    ),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (3, 4, 8), f"{CONV} oft"),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (3, 4, 8, 8), f"{CONV} oft"),
    "conv2d, 1×1": (lambda: nn.Conv2d(4, 8, 1), (3, 4, 8, 8), f"{CONV} fact oft repadapter"),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (3, 4, 8, 8), CONV),
    "conv2d, reflecting": (
        lambda: nn.Conv2d(4, 8, 3, 2, 1, padding_mode="reflect"),
        (3, 4, 8, 8),
        f"{CONV} oft",
    ),
    "conv3d": (lambda: nn.Conv3d(4, 8, 3, padding=1), (3, 4, 8, 8, 8), f"{CONV} oft"),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(4, 8, 2, 2),
        (3, 4, 4),
        "bias bitfit full loha lokr lora shira ssf svdiff",
    ),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 8, 2, 2, groups=2),
        (3, 4, 4, 4),
        "bias bitfit full loha lokr lora shira ssf svdiff",
    ),
    "transposed 3d": (
        lambda: nn.ConvTranspose3d(4, 8, 2, 2),
        (3, 4, 4, 4, 4),
        "bias bitfit full loha lokr lora shira ssf svdiff",
    ),
    "layer norm": (lambda: nn.LayerNorm(6), (3, 6, 6), f"{NORM} ln"),
    "instance norm": (lambda: nn.InstanceNorm2d(6, affine=True), (3, 6, 6, 6), NORM),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), (3, 6, 6), ATTENTION),
    "attention, batch second": (lambda: nn.MultiheadAttention(6, 2), (6, 3, 6), ATTENTION),
}
OPTIONS = {
    "svdiff": {"norms": True},
    "lora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 1},
    "miss": {"rank": 4},
    "shira": {"rank": 1},
    "vera": {"rank": 5},
    "full": {"keep_base": True},
}


class Holder(nn.Module):
    """One layer, which as an attention attends to its own input."""

    def __init__(self, layer):
        super().__init__()
        self.attn = layer

    def forward(self, x):
        if isinstance(self.attn, nn.MultiheadAttention):
            return self.attn(x, x, x, need_weights=False)[0]
        return self.attn(x)


def drawn(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


class Block(nn.Module):
    """A transformer block that takes tokens with and without a batch."""

    def __init__(self, batch_first):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
