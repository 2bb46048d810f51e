"""Tokens that adapters add to a sequence: put in, taken off, and given room in masks and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import MedpeftError


@dataclass(frozen=True)
class TokenSpan:
    """Place of an adapter's tokens in a sequence.

    Attributes:
        count: Number of tokens that the adapter adds, n.
        start: Number of the tokens before them.
        axis: Axis of the tokens: 1, or 0 if the batch comes second.
    """

    count: int
    start: int
    axis: int = 1

    def for_every_sample(self, tokens: Tensor, x: Tensor) -> Tensor:
        """Repeat `tokens` for every sample of `x`: (n, D) → (B, n, D), or (n, B, D) with the batch second."""
        shape = list(x.shape)
        shape[self.axis] = self.count
        # (n, D) → (1, n, D) → (B, n, D); with the batch second (n, D) → (n, 1, D) → (n, B, D)
        return tokens.to(x.dtype).unsqueeze(1 - self.axis).expand(shape)

    def insert(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Put `tokens` into `x`, one row of them for every sample: (B, N, D) → (B, N + n, D)."""
        before, after = x.tensor_split([self.start], self.axis)
        return torch.cat([before, tokens, after], self.axis)

    def take_off(self, x: Tensor) -> Tensor:
        """Drop the added tokens: (B, N + n, D) → (B, N, D)."""
        before, _, after = x.tensor_split([self.start, self.start + self.count], self.axis)
        return torch.cat([before, after], self.axis)

    def widened(self, value: Any, name: str, tokens: int, *, seen: bool = True) -> Any:
        """Make room for the added tokens, which all others see, in rotations or a mask.

        Anything else is returned unchanged.

        Args:
            value: An input of the layer beside its tokens.
            name: Its name; a number if the layer's forward has none for it.
            tokens: Number of tokens in the mask, N.
            seen: Value of a boolean mask for a token that is attended to.
        """
        if name == "rope":
            return self._widen_rotations(value)
        if not _is_mask(value, name, tokens):
            return value
        fill = int(seen)
        if value.is_floating_point():
            fill = 0  # It is added to the scores.
        of_pairs = value.shape[-2] == tokens and "padding" not in name
        value = self._widen(value, -1, fill)  # (…, N) → (…, N + n)
        if of_pairs:
            value = self._widen(value, -2, fill)  # (…, N, N + n) → (…, N + n, N + n)
        return value

    def _widen(self, mask: Tensor, axis: int, fill: int) -> Tensor:
        before, after = mask.tensor_split([self.start], axis)
        shape = list(mask.shape)
        shape[axis] = self.count
        return torch.cat([before, mask.new_full(shape, fill), after], axis)

    def _widen_rotations(self, rotations: Any) -> Any:
        """Prepend rotations by no angle to timm's rotations of the patches; return None unchanged."""
        if not isinstance(rotations, Tensor):
            return rotations
        *leading, _, width = rotations.shape
        unmoved = rotations.new_zeros(*leading, self.count, width)
        unmoved[..., width // 2 :] = 1  # The first half of the last axis holds sines, the second cosines.
        return torch.cat([unmoved, rotations], -2)  # (…, N, 2·D) → (…, n + N, 2·D)


def _is_mask(value: Any, name: str, tokens: int) -> bool:
    """Whether an input has a value for every token, by its shape and, if it has one, its name."""
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != tokens:
        return False
    return name.isdigit() or "mask" in name or "bias" in name


def in_brackets(name: str) -> str:
    """Write an input's name for a message: ` (attn_mask)`; empty if it has only a number."""
    if name.isdigit():
        return ""
    return f" ({name})"


def require_sequence(x: Any, method: str, name: str) -> None:
    """Raise `MedpeftError` unless `x` is a batch of token sequences, (B, N, D)."""
    if isinstance(x, Tensor) and x.ndim == 3:
        return
    refused = type(x).__name__
    if isinstance(x, Tensor):
        refused = str(tuple(x.shape))
    reason = f"{method!r} adds tokens to sequences (B, N, D), and {name} was given {refused}"
    raise MedpeftError(f"{reason}: exclude it, or try another method.")
