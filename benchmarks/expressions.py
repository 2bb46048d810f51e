"""The plain expressions of some methods, as their original implementations compute them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLoRA(nn.Module):
    """y + (α/r)·B·A·x."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.in_features, 8, bias=False)
        self.up = nn.Linear(8, layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank change to the layer's output."""
        return self.layer(x) + self.up(self.down(x))


class PlainSSF(nn.Module):
    """y·γ + β on the last axis, or on the channels of a convolution."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.shape = (1, -1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        self.scale = nn.Parameter(torch.ones(len(layer.weight)))
        self.shift = nn.Parameter(torch.zeros(len(layer.weight)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift the layer's output."""
        # (C,) → (1, C, 1, 1) beside a convolution
        return self.layer(x) * self.scale.view(self.shape) + self.shift.view(self.shape)


class PlainTSA(nn.Module):
    """conv(x) + conv1x1(x)."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer
        self.alpha = nn.Conv2d(layer.in_channels, layer.out_channels, 1, layer.stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add both convolutions."""
        return self.layer(x) + self.alpha(x)


class PlainSVDiff(nn.Module):
    """The layer with U·diag(relu(σ + δ))·Vᵀ built in every forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # (out, C, kernel …) → (out, fan-in)
        left, values, right = torch.linalg.svd(layer.weight.detach().flatten(1), full_matrices=False)
        self.register_buffer("left", left)
        self.register_buffer("values", values)
        self.register_buffer("right", right)
        self.layer = layer
        self.delta = nn.Parameter(torch.zeros_like(values))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer's output with the shifted spectrum."""
        matrix = (self.left * (self.values + self.delta).relu()) @ self.right
        weight = matrix.view(self.layer.weight.shape)  # (out, fan-in) → (out, C, kernel …)
        if isinstance(self.layer, nn.Linear):
            return F.linear(x, weight, self.layer.bias)
        return self.layer._conv_forward(x, weight, self.layer.bias)


class LowRankSum(nn.Module):
    """W + B·A, as a parametrization of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(weight.shape[0], 8))
        self.down = nn.Parameter(torch.randn(8, weight.shape[1]) / math.sqrt(weight.shape[1]))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the low-rank change to the weight."""
        return weight + self.up @ self.down
