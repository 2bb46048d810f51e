"""How a convolution slides: what an adapter of it must repeat, and where a 1×1 kernel falls inside the layer's own."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import MedpeftError

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding, dilation and groups of a convolution, one number per spatial axis.

    `before` and `after` are the padding on each side; both are empty where the layer pads by its input's size, as
    TensorFlow does.
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
        """The geometry of a convolution layer."""
        dims = len(layer.kernel_size)
        # torch keeps padding as (before, after) pairs, last axis first.
        pairs = layer._reversed_padding_repeated_twice
        before, after = tuple(pairs[0::2][::-1]), tuple(pairs[1::2][::-1])
        if pads_by_input(layer):
            before = after = ()
        return cls(
            tuple(layer.kernel_size), tuple(layer.stride), tuple(layer.dilation), before, after,
            layer.groups, "zeros" if dims == 0 else layer.padding_mode,
        )  # fmt: skip

    @property
    def dims(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def same_size_as_1x1(self) -> bool:
        """Whether a 1×1 kernel of the same stride gives an output of the layer's size, for some input."""
        if not self.before:
            return True
        spans = zip(self.kernel, self.dilation, self.before, self.after, self.stride, strict=True)
        return all(0 <= d * (k - 1) - b - a < s for k, d, b, a, s in spans)

    @property
    def centre(self) -> tuple[int, ...] | None:
        """Tap of the kernel that sees what a 1×1 kernel of the same stride sees; None where no tap does."""
        if not self.before:
            return (0,) * self.dims if set(self.kernel) == {1} else None
        if any(b % d for b, d in zip(self.before, self.dilation, strict=True)):
            return None
        taps = tuple(b // d for b, d in zip(self.before, self.dilation, strict=True))
        return taps if all(t < k for t, k in zip(taps, self.kernel, strict=True)) else None

    def convolve(self, x: Tensor, weight: Tensor, groups: int = 1) -> Tensor:
        """`x` convolved with `weight` at the layer's stride, padding, padding mode and dilation."""
        before, after = (self.before, self.after) if self.before else self._by_size(x)
        padding: tuple[int, ...] | int = before
        if self.mode != "zeros" or before != after:
            pairs = [p for both in zip(before[::-1], after[::-1], strict=True) for p in both]
            x, padding = F.pad(x, pairs, "constant" if self.mode == "zeros" else self.mode), 0
        return _CONVOLVE[self.dims](x, weight, None, self.stride, padding, self.dilation, groups)

    def _by_size(self, x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding before and after as TensorFlow's "SAME": the output is the input's size over the stride, rounded up."""
        sizes = zip(x.shape[-self.dims :], self.kernel, self.stride, self.dilation, strict=True)
        total = [max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0) for n, k, s, d in sizes]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)

    def spread(self, matrix: Tensor) -> Tensor:
        """The kernel, (O, I, …), that computes what a 1×1 kernel of the same stride does: zero but at one tap.

        Raises:
            MedpeftError: no tap sees what the 1×1 kernel sees.
        """
        tap = self.centre
        if tap is None:
            raise MedpeftError(
                f"no tap of a kernel of {self.kernel} with padding {self.before or 'by input size'} sees what the 1×1 kernel "
                "sees"
            )
        around = [n for t, k in zip(tap[::-1], self.kernel[::-1], strict=True) for n in (t, k - 1 - t)]
        return F.pad(matrix.view(*matrix.shape, *[1] * self.dims), around)

    def subsample(self, x: Tensor) -> Tensor:
        """Every `stride`-th position of `x`, those that a 1×1 kernel sees."""
        for axis, step in enumerate(self.stride, start=x.ndim - self.dims):
            x = x[(slice(None),) * axis + (slice(None, None, step),)] if step > 1 else x
        return x

    def pointwise(self, x: Tensor, weight: Tensor, groups: int = 1, strided: bool = True, bias: Tensor | None = None) -> Tensor:
        """`x` mixed over channels by `weight`, (O, I / groups), at the layer's stride."""
        kernel = weight.view(*weight.shape, *[1] * self.dims)
        return _CONVOLVE[self.dims](x, kernel, bias, self.stride if strided else 1, 0, 1, groups)


def pads_by_input(layer: nn.Module) -> bool:
    """Whether the padding depends on the input's size (timm's `Conv2dSame` and its kin)."""
    return any(cls.__name__.endswith("Same") for cls in type(layer).__mro__)


def slides_plainly(layer: nn.Module) -> bool:
    """Whether the layer is torch's own convolution: no weight standardisation, no padding by the input's size."""
    own = next((cls for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, cls)), None)
    same = own is not None and type(layer).forward is own.forward
    return own is not None and same and type(layer)._conv_forward is own._conv_forward  # type: ignore[attr-defined]


def standardises(layer: nn.Module) -> bool:
    """Whether the layer standardises its weight in every forward (timm's `StdConv2d`, Hugging Face's, and their kin)."""
    return any(re.search(r"StdConv|WeightStandardi|WSConv", cls.__name__) for cls in type(layer).__mro__)
