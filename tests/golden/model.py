"""The base of the golden files: a layer of every kind, in plain torch, with weights that never change.

Nothing here comes from a library that may change its models, and no random numbers: the weights are multiples of 1/1009.
"""

import torch
from torch import nn


class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.fc2(self.fc1(x).relu())


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Golden(nn.Module):
    def __init__(self, classes=3, width=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.layer = BasicBlock(width)
        self.blocks = nn.Sequential(Block(width))
        self.head = nn.Linear(width, classes)
        fill(self)

    def forward(self, x):
        x = self.layer(self.stem(x))
        return self.head(self.blocks(x.flatten(2).transpose(1, 2)).mean(1))


def window_partition(x, size):
    b, h, w, d = x.shape
    # (B, H, W, D) → (B·H/s·W/s, s², D)
    cut = x.view(b, h // size, size, w // size, size, d).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(-1, size * size, d)


def window_reverse(windows, size, shape):
    b, h, w, d = shape
    # (B·H/s·W/s, s², D) → (B, H, W, D)
    cut = windows.view(b, h // size, w // size, size, size, d).permute(0, 1, 3, 2, 4, 5)
    return cut.reshape(shape)


class WindowBlock(Block):
    """A block that cuts its tokens, (B, H, W, D), into windows for the attention, as Swin's does."""

    def __init__(self, width):
        super().__init__(width)
        self.drop_path = nn.Identity()

    def forward(self, x):
        attended = self.attn(window_partition(self.norm1(x), 2))
        x = x + self.drop_path(window_reverse(attended, 2, x.shape))
        return x + self.mlp(self.norm2(x))


class GoldenWindows(nn.Module):
    """The base of files whose adapters stand around windows."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(WindowBlock(width))
        self.head = nn.Linear(width, classes)
        fill(self)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x).movedim(1, -1)).mean((1, 2)))


def base_of(case):
    """The base of a golden file, by its name."""
    return GoldenWindows() if case == "convpass_around" else Golden()


@torch.no_grad()
def fill(model, start=1, only=None):
    """Give every parameter and running statistic its place in one sequence.

    It is quadratic so that no weight lacks rank: the singular vectors of zeros, which svdiff moves, are anyone's choice.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and (only is None or name in only):
            index = torch.arange(start, start + tensor.numel())
            values = ((57 * index * index + 113 * index) % 1009).double() / 1009
            gain = name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1)
            tensor.copy_((values + 0.5 if gain else values - 0.5).view(tensor.shape))
            start += tensor.numel()


def example():
    return (torch.arange(2 * 8 * 8, dtype=torch.float32) * 5 % 17 / 17 - 0.5).view(2, 1, 8, 8)
