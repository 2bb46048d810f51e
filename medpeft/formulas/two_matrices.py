"""The two matrices of a bottleneck: `down` to a few channels, and `up` from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import cast


class TwoMatrices:
    """Two matrices with their biases, for a module that has them among its own parameters.

    A mixin and not a module, since files name the matrices by their owner: `down` in AdaptFormer and
    Convpass, `bottleneck.down` in Houlsby's adapters. The owner draws the values of `down`; all others
    start at zero.
    """

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def add_down(self, inputs: int, width: int) -> None:
        """Create `down`, (width, inputs), and its bias."""
        self.down = nn.Parameter(torch.empty(width, inputs))
        self.down_bias = nn.Parameter(torch.zeros(width))

    def add_up(self, width: int, outputs: int) -> None:
        """Create `up`, (outputs, width), and its bias."""
        self.up = nn.Parameter(torch.zeros(outputs, width))
        self.up_bias = nn.Parameter(torch.zeros(outputs))

    def narrow(self, x: Tensor, axis: int) -> Tensor:
        """Compute down(x) over the channels of `x` on an axis: (B, …, D), or (B, D, …), → (B, …, width)."""
        channels_last = cast(x, self.down).movedim(axis, -1)
        return F.linear(channels_last, self.down, self.down_bias)

    def widen(self, hidden: Tensor, axis: int) -> Tensor:
        """Compute up(hidden), its channels on an axis: (B, …, width) → (B, …, D), or (B, D, …)."""
        return F.linear(hidden, self.up, self.up_bias).movedim(-1, axis)
