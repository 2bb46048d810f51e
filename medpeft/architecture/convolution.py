"""Geometry of a convolution: its adapter must slide likewise, and a 1×1 kernel falls on one of its taps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import MedpeftError
from .layers import CONVS, class_names, has_own_forward, lies_transposed

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LINEAR_FORWARDS = (
    nn.Linear.forward,
    nn.ConvTranspose1d.forward,
    nn.ConvTranspose2d.forward,
    nn.ConvTranspose3d.forward,
)
_STANDARDISED = re.compile(r"StdConv|WeightStandardi|WSConv")


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding, dilation and groups of a convolution, one number per spatial axis.

    >>> Geometry.of(nn.Conv2d(3, 8, 3, padding=1)).kernel
    (3, 3)

    Attributes:
        kernel: Size of the kernel.
        stride: Step of the kernel.
        dilation: Distance between taps of the kernel.
        before: Padding before the first element; empty for a layer that pads by its input's size.
        after: Padding after the last element, empty likewise.
        groups: Groups of channels.
        mode: torch's padding mode.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    groups: int
    mode: str

    @classmethod
    def of(cls, layer: _ConvNd) -> Geometry:
        """Read the geometry of a convolution layer."""
        before: tuple[int, ...] = ()
        after: tuple[int, ...] = ()
        if not pads_by_input(layer):
            # torch keeps padding as (before, after) pairs, last axis first.
            pairs = layer._reversed_padding_repeated_twice
            before, after = tuple(pairs[0::2][::-1]), tuple(pairs[1::2][::-1])
        return cls(
            kernel=tuple(layer.kernel_size),
            stride=tuple(layer.stride),
            dilation=tuple(layer.dilation),
            before=before,
            after=after,
            groups=layer.groups,
            mode=layer.padding_mode,
        )

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def channel_axis(self) -> int:
        """Axis of the channels, from the end: also in one image without a batch, (C, H, W)."""
        return -1 - self.dims

    @property
    def same_size_as_1x1(self) -> bool:
        """Whether a 1×1 kernel of the same stride gives an output of the layer's size for some input."""
        if not self.before:
            return True
        for axis in range(self.dims):
            span = self.dilation[axis] * (self.kernel[axis] - 1)
            missing = span - self.before[axis] - self.after[axis]
            if not 0 <= missing < self.stride[axis]:
                return False
        return True

    @property
    def centre(self) -> tuple[int, ...] | None:
        """Tap of the kernel where a 1×1 kernel of the same stride would lie; None if no tap does."""
        if not self.before:
            return (0,) * self.dims if set(self.kernel) == {1} else None
        taps = []
        for axis in range(self.dims):
            tap, between = divmod(self.before[axis], self.dilation[axis])
            if between or tap >= self.kernel[axis]:
                return None
            taps.append(tap)
        return tuple(taps)

    def as_kernel(self, matrix: Tensor) -> Tensor:
        """View a matrix as a kernel of this size: (O, I·k₁·…) → (O, I, k₁, …)."""
        return matrix.view(len(matrix), -1, *self.kernel)

    def convolve(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """Convolve `x` with `weight` at the layer's stride, padding, padding mode and dilation.

        Raises:
            MedpeftError: `x` is too small to be padded with its own values.
        """
        before, after = (self.before, self.after) if self.before else self._padding_by_size(x)
        if self.mode == "zeros" and before == after:
            return CONVOLVE[self.dims](x, weight, None, self.stride, before, self.dilation, groups)
        mode = "constant" if self.mode == "zeros" else self.mode
        self._require_values_for_padding(x, before, after)
        padded = F.pad(x, _pairs_for_pad(before, after), mode)
        return CONVOLVE[self.dims](padded, weight, None, self.stride, 0, self.dilation, groups)

    def _require_values_for_padding(self, x: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Raise where reflection, or going round, would need more values than an axis has."""
        spare = {"reflect": 1, "circular": 0}.get(self.mode)
        if spare is None:
            return
        for size, first, last in zip(x.shape[-self.dims :], before, after, strict=True):
            if max(first, last) > size - spare:
                raise MedpeftError(
                    f"{tuple(x.shape)} is too small to be padded by {max(first, last)} with "
                    f"padding_mode={self.mode!r}: use a larger image, or exclude the layer."
                )

    def _padding_by_size(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding as TensorFlow's "SAME": the output has the input's size over the stride, rounded up."""
        before, after = [], []
        for axis, size in enumerate(x.shape[-self.dims :]):
            stride, span = self.stride[axis], self.dilation[axis] * (self.kernel[axis] - 1)
            steps = -(-size // stride) - 1
            total = max(steps * stride + span + 1 - size, 0)
            before.append(total // 2)
            after.append(total - total // 2)
        return tuple(before), tuple(after)

    def spread(self, matrix: Tensor) -> Tensor:
        """Make a kernel, zero but at one tap, that computes what a 1×1 kernel of the same stride does.

        Raises:
            MedpeftError: no tap sees what the 1×1 kernel sees.
        """
        tap = self.centre
        if tap is None:
            padding = self.before or "by input size"
            kernel = f"a kernel of {self.kernel} with padding {padding}"
            raise MedpeftError(f"no tap of {kernel} sees what the 1×1 kernel sees")
        after = tuple(size - 1 - at for at, size in zip(tap, self.kernel, strict=True))
        # (O, I, 1, …, 1) → (O, I, *kernel)
        return F.pad(self._as_1x1(matrix), _pairs_for_pad(tap, after))

    def subsample(self, x: Tensor) -> Tensor:
        """Take every `stride`-th position of `x`: those that a 1×1 kernel sees."""
        steps: list[Any] = [slice(None, None, step) for step in self.stride]
        return x[(..., *steps)]

    def pointwise(
        self,
        x: Tensor,
        weight: Tensor,
        groups: int = 1,
        strided: bool = True,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Mix the channels of `x` by `weight`, (O, I / groups), at the layer's stride."""
        stride = self.stride if strided else 1
        return CONVOLVE[self.dims](x, self._as_1x1(weight), bias, stride, 0, 1, groups)

    def _as_1x1(self, matrix: Tensor) -> Tensor:
        # (O, I) → (O, I, 1, …, 1)
        return matrix.view(*matrix.shape, *[1] * self.dims)


def _pairs_for_pad(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    """Arrange padding as `F.pad` takes it: (before, after) pairs, last axis first."""
    pairs: list[int] = []
    for axis in reversed(range(len(before))):
        pairs += [before[axis], after[axis]]
    return pairs


def pads_by_input(layer: nn.Module) -> bool:
    """Whether the padding depends on the input's size, as in timm's `Conv2dSame`."""
    return any(name.endswith("Same") for name in class_names(layer))


def slides_plainly(layer: nn.Module) -> bool:
    """Whether the layer computes as torch's own convolution, without changing its weight or its input."""
    for conv in CONVS:
        if isinstance(layer, conv):
            computes: type[nn.Conv1d | nn.Conv2d | nn.Conv3d] = type(layer)
            return computes.forward is conv.forward and computes._conv_forward is conv._conv_forward
    return False


def is_affine(layer: nn.Module) -> bool:
    """Whether the layer computes W·x + b, by a forward of torch's or transformers' own."""
    if has_own_forward(layer):
        return False
    if lies_transposed(layer):
        return True
    return type(layer).forward in _LINEAR_FORWARDS or slides_plainly(layer)


def standardises(layer: nn.Module) -> bool:
    """Whether the layer standardises its weight in every forward, as timm's `StdConv2d` does."""
    return any(_STANDARDISED.search(name) for name in class_names(layer))
