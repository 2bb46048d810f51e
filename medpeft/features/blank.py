"""Shapes of values without the values, for any number of images; filled with zeros or with a tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MedpeftError

_PLAIN = (bool, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True)
class Count:
    """A whole number that grows with the number of images: so many for each."""

    each: int


@dataclass(frozen=True)
class Blank:
    """A tensor without its values.

    Attributes:
        shape: Its shape; the axes that grow with the number of images are `Count`s.
        order: Its axes as they lie in memory, the one with the largest steps first.
        dtype: Its dtype.
        is_changed: Whether someone writes into it.
    """

    shape: tuple[int | Count, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    is_changed: bool = False

    @property
    def batch_axis(self) -> int | None:
        """The axis that has one entry for each image, None if there is no such one."""
        axes = [axis for axis, size in enumerate(self.shape) if isinstance(size, Count)]
        if len(axes) == 1 and self.shape[axes[0]] == Count(1):
            return axes[0]
        return None

    def zeros(self, images: int, device: torch.device | str) -> Tensor:
        """Make zeros of this shape; unless someone writes into them, every element is the same one."""
        zeros = torch.zeros((), dtype=self.dtype, device=device).expand(sizes(self.shape, images))
        return zeros.clone() if self.is_changed else zeros


def sizes(shape: tuple[int | Count, ...], images: int) -> list[int]:
    """Sizes of a shape for a number of images."""
    return [size.each * images if isinstance(size, Count) else size for size in shape]


def described(
    first: Any, second: Any, images: tuple[int, int], is_changed: Callable[[Tensor], bool] = lambda _: False
) -> Any:
    """Describe a nested value by what it is for two numbers of images.

    Args:
        first: The value for the first number.
        second: The value for the second one.
        images: The two numbers.
        is_changed: Whether someone writes into a tensor of the first value.

    Returns:
        The value, with a `Blank` for every tensor and a `Count` for every number that grows.

    Raises:
        MedpeftError: it has something else in it, or does not grow with the number of images.
    """
    if type(first) is not type(second):
        raise MedpeftError(f"is {type(first).__name__} or {type(second).__name__}")
    if isinstance(first, Tensor):
        shape = tuple(_size(*pair, images) for pair in zip(first.shape, second.shape, strict=True))
        steps = list(first.stride())
        order = sorted(range(first.ndim), key=lambda axis: -steps[axis])
        return Blank(shape, tuple(order), first.dtype, is_changed(first))
    if isinstance(first, _PLAIN):
        if first != second:
            raise MedpeftError(f"is {first!r} or {second!r}")
        return first
    if isinstance(first, int):
        return _size(first, second, images)
    if type(first) is dict:
        if list(first) != list(second):
            raise MedpeftError("has other keys for another number of images")
        values = described(tuple(first.values()), tuple(second.values()), images, is_changed)
        return dict(zip(first, values, strict=True))
    if not isinstance(first, (list, tuple)) or len(first) != len(second):
        raise MedpeftError(f"is a {type(first).__name__}")
    items = [described(*pair, images, is_changed) for pair in zip(first, second, strict=True)]
    if hasattr(first, "_fields"):  # a named tuple
        return type(first)(*items)
    return list(items) if isinstance(first, list) else tuple(items)


def _size(first: int, second: int, images: tuple[int, int]) -> int | Count:
    if first == second:
        return first
    each = first // images[0]
    if (first, second) != (each * images[0], each * images[1]):
        raise MedpeftError(f"is {first} for {images[0]} images and {second} for {images[1]}")
    return Count(each)


def filled(description: Any, images: int, make: Callable[[Blank], Tensor]) -> Any:
    """Make a value of a description again, with `make` for its tensors."""
    if isinstance(description, Blank):
        return make(description)
    if isinstance(description, Count):
        return description.each * images
    if isinstance(description, dict):
        return {key: filled(item, images, make) for key, item in description.items()}
    if isinstance(description, (list, tuple)):
        items = [filled(item, images, make) for item in description]
        if hasattr(description, "_fields"):
            return type(description)(*items)
        return type(description)(items)
    return description
