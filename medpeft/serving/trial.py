"""May each image of a batch have its own adapter? Tried out: does every layer get its rows image by image?

A layer within windows gets several rows of each image, and that of a sequence-first attention gets one row of
all images: shapes alone do not tell. So the model runs on two images and on the first of them alone. Where
the first half of what enters and leaves a layer is that of the first image alone, its rows come image by
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .inputs import Inputs
from .joined import CONSTANTS
from .mirror import Mirror
from .rows import Tensors

_NEAR = 0.05
"""Rounding moves an image's values by less than this share of what tells it from another image."""

_Calls = list[tuple[int, Any]]
"""What entered or left layers, in order, with the `id` of the layer."""


def uncalled(
    adapted_mirror: nn.Module, tensors: Tensors, names: Sequence[str], one: Inputs
) -> list[str] | None:
    """Try whether the rows of every layer's input and output come image by image.

    Args:
        adapted_mirror: An adapted model.
        tensors: Tensors of one adapter.
        names: Names of the layers.
        one: The inputs of one image.

    Returns:
        Names of the layers that are not called at all; None if the rows of a layer do not come so.
    """
    alone = _calls(adapted_mirror, tensors, names, one)
    both = _calls(adapted_mirror, tensors, names, one.followed_by(_another(one.x)))
    if len(alone) != len(both):
        return None
    for (layer, value), (same_layer, pair) in zip(alone, both, strict=True):
        if layer != same_layer or not _is_first_half(value, pair):
            return None
    called = {layer for layer, _ in alone}
    return [name for number, name in enumerate(names) if number not in called]


def is_near(output: Any, other: Any) -> bool:
    """Whether two outputs are the same but for rounding."""
    pairs = zip(pytree.tree_leaves(output), pytree.tree_leaves(other), strict=True)
    for one, two in pairs:
        if isinstance(one, Tensor) and isinstance(two, Tensor):
            size = two.double().abs().max()
            if not bool((one.double() - two.double()).abs().max() <= _NEAR * size):
                return False
        elif not isinstance(one, CONSTANTS) or not isinstance(two, CONSTANTS) or one != two:
            return False
    return True


def _another(x: Tensor) -> Tensor:
    """Make another image of one: other values in the same range."""
    turned = x.flip(tuple(range(1, x.ndim)))
    if not x.is_floating_point():
        return turned
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    return turned + x.std().nan_to_num(1.0).clamp_min(1e-3) * noise


def _calls(adapted_mirror: nn.Module, tensors: Tensors, names: Sequence[str], inputs: Inputs) -> _Calls:
    """Run the model, and note what enters and leaves the layers."""
    mirror = Mirror(tensors)
    mirrored = mirror.of(adapted_mirror)
    calls: _Calls = []
    for number, name in enumerate(names):
        layer = mirror.of(adapted_mirror.get_submodule(name))
        bare = Mirror(tensors).of(adapted_mirror.get_submodule(name))
        layer.__dict__["forward"] = partial(_noted, bare, number, calls)
    mirrored(inputs.x, **inputs.others)
    return calls


def _noted(layer: nn.Module, number: int, calls: _Calls, *args: Any, **kwargs: Any) -> Any:
    entered: Any = None
    if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
        entered = args[0].clone()  # The model may write into it later.
    y = layer.forward(*args, **kwargs)
    left: Any = None
    if isinstance(y, Tensor):
        left = y.clone()
    calls += [(number, entered), (number, left)]
    return y


def _is_first_half(one: Any, pair: Any) -> bool:
    """Whether the values of one image are the first half of those of two.

    They must be unlike the second half, or where a layer gets the same for every image, unlike one another:
    otherwise the order of the rows does not show.
    """
    if not isinstance(one, Tensor) or not isinstance(pair, Tensor) or not one.ndim or not one.numel():
        return False
    if pair.shape != (2 * len(one), *one.shape[1:]):
        return False
    first, second = pair.double().chunk(2)
    off, apart = (first - one).abs().max(), (second - one).abs().max()
    if len(one) == 1:
        apart = torch.maximum(apart, one.double().abs().max())
    elif apart <= _NEAR * (one[1:] - one[0]).double().abs().max():
        apart = (one[1:] - one[0]).double().abs().max()
    return bool(off <= _NEAR * apart) and bool(apart > 0)
