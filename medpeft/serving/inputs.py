"""Inputs of a model for a batch of images, of which some may be taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Inputs:
    """Inputs of a model: the images, and others by keyword.

    Which of the others have rows is told once, of the whole batch: the tokens of a text that all images share
    may be as many as the images of a part of it.

    Attributes:
        x: The images along the first axis.
        leaves: All values in the others, also in their lists and dicts.
        form: How the others are made of these.
        divided: For each of them, whether it is a tensor with one row an image.
    """

    x: Tensor
    leaves: tuple[Any, ...]
    form: pytree.TreeSpec
    divided: tuple[bool, ...]

    @classmethod
    def of_batch(cls, x: Tensor, others: Mapping[str, Any]) -> Inputs:
        """Take those of a whole batch."""
        leaves, form = pytree.tree_flatten(dict(others))
        divided = tuple(has_rows(leaf, len(x)) for leaf in leaves)
        return cls(x, tuple(leaves), form, divided)

    @property
    def others(self) -> dict[str, Any]:
        """Those by keyword."""
        others: dict[str, Any] = pytree.tree_unflatten(list(self.leaves), self.form)
        return others

    def of(self, numbers: Sequence[int]) -> Inputs:
        """Take those of some images."""
        if list(numbers) == list(range(len(self.x))):
            return self
        chosen = torch.tensor(numbers, device=self.x.device)
        leaves = []
        for leaf, is_divided in zip(self.leaves, self.divided, strict=True):
            leaves.append(leaf[chosen.to(leaf.device)] if is_divided else leaf)
        return replace(self, x=self.x[chosen], leaves=tuple(leaves))

    def followed_by(self, x: Tensor) -> Inputs:
        """Add as many other images, which have the same further inputs."""
        leaves = []
        for leaf, is_divided in zip(self.leaves, self.divided, strict=True):
            leaves.append(torch.cat([leaf, leaf]) if is_divided else leaf)
        return replace(self, x=torch.cat([self.x, x]), leaves=tuple(leaves))

    def signature(self) -> tuple[Any, ...]:
        """Describe everything but the values of tensors and the number of images."""
        described: list[Any] = [self.x.shape[1:], self.x.dtype, self.x.device, str(self.form)]
        for leaf, is_divided in zip(self.leaves, self.divided, strict=True):
            if not isinstance(leaf, Tensor):
                described.append(repr(leaf))  # A flag can have the model run other layers.
            elif is_divided:
                described += [leaf.shape[1:], leaf.dtype]
            else:
                described += [leaf.shape, leaf.dtype]
        return tuple(described)


def has_rows(value: Any, images: int) -> bool:
    """Whether a value is a tensor with one row an image."""
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == images
