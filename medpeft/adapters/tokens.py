"""Tokens that adapters add to a sequence: put in, taken off, and made room for in masks and rotations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import MedpeftError


def insert(x: Tensor, tokens: Tensor, at: int, axis: int) -> Tensor:
    """`x`, (B, N, D), with `tokens`, (n, D), put in before token number `at` of every sample; `axis` is that of the tokens."""
    before, after = x.tensor_split([at], axis)
    shape = list(x.shape)
    shape[axis] = len(tokens)
    return torch.cat([before, tokens.to(x.dtype).unsqueeze(1 - axis).expand(shape), after], axis)


def take_off(x: Tensor, count: int, at: int, axis: int) -> Tensor:
    """`x` without the `count` tokens from number `at` on."""
    before, _, after = x.tensor_split([at, at + count], axis)
    return torch.cat([before, after], axis)


def pad_mask(value: Any, name: str, tokens: int, count: int, at: int, *, seen: bool = True) -> Any:
    """A mask of `tokens` tokens with `count` more, which all others see, before number `at`; anything else as it is.

    `seen` is what a mask of truth values says of a token that is attended to.
    """
    is_mask = isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == tokens
    if not is_mask or (name and "mask" not in name and "bias" not in name):
        return value
    free = 0 if value.is_floating_point() else int(seen)
    pairs = value.shape[-2] == tokens and "padding" not in name
    for axis in (-1, -2) if pairs else (-1,):
        before, after = value.tensor_split([at], axis)
        shape = list(value.shape)
        shape[axis] = count
        value = torch.cat([before, value.new_full(shape, free), after], axis)
    return value


def stand_still(rotations: Any, count: int) -> Any:
    """timm's rotations of the patches, (…, N, sines and cosines), with `count` by no angle before them; None as it is."""
    if not isinstance(rotations, Tensor):
        return rotations
    still = rotations.new_zeros(*rotations.shape[:-2], count, rotations.shape[-1])
    still[..., rotations.shape[-1] // 2 :] = 1
    return torch.cat([still, rotations], -2)


def require_sequence(x: Any, method: str, name: str) -> None:
    """Raise `MedpeftError` unless `x` is a batch of token sequences, (B, N, D)."""
    if not isinstance(x, Tensor) or x.ndim != 3:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise MedpeftError(
            f"{method!r} adds tokens to sequences (B, N, D), and {name} was given {shape}: exclude it, or try another method."
        )
