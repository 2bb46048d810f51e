"""What a model returned for parts of a batch, put together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import require
from .inputs import has_rows

CONSTANTS = (type(None), bool, int, str)
"""Values in an output that are of no image. A number such as a loss is of all that were computed together."""


class _Part(NamedTuple):
    """What the model returned for some images.

    Attributes:
        numbers: Numbers of the images in the batch.
        leaves: All values in the output.
        form: How the output is made of these.
    """

    numbers: list[int]
    leaves: list[Any]
    form: pytree.TreeSpec


def joined(outputs: Sequence[tuple[list[int], Any]], images: int) -> Any:
    """Put what was computed in parts together again, leaf by leaf.

    Args:
        outputs: For each part the numbers of its images in the batch, and what the model returned for them.
        images: Images in the batch.

    Returns:
        What the model would return for the batch; where parts differ in shape a list, with what it returns
        for each image.

    Raises:
        MedpeftError: a part's output has no row for each image.
    """
    if len(outputs) == 1:
        return outputs[0][1]
    parts = []
    for numbers, output in outputs:
        leaves, form = pytree.tree_flatten(output)
        for leaf in leaves:
            _require_rows(leaf, len(numbers))
        parts.append(_Part(numbers, leaves, form))
    if _agree(parts):
        whole = [_joined_leaf(parts, at, images) for at in range(len(parts[0].leaves))]
        return pytree.tree_unflatten(whole, parts[0].form)
    by_image: list[Any] = [None] * images
    for part in parts:
        for row, number in enumerate(part.numbers):
            own = [leaf[row] if isinstance(leaf, Tensor) else leaf for leaf in part.leaves]
            by_image[number] = pytree.tree_unflatten(own, part.form)
    return by_image


def _require_rows(leaf: Any, images: int) -> None:
    """Raise `MedpeftError` unless a value has a row for each image, or is of no image."""
    if isinstance(leaf, Tensor):
        require(
            has_rows(leaf, images),
            f"The model returned a tensor of the shape {tuple(leaf.shape)} for {images} images. One without "
            "a row for each cannot be divided: call the bank with one name.",
        )
    else:
        require(
            isinstance(leaf, CONSTANTS),
            f"The model returned a {type(leaf).__name__}, in which the bank finds no row for each image: "
            "have it return tensors, also in tuples, lists and dicts, or call the bank with one name.",
        )


def _agree(parts: Sequence[_Part]) -> bool:
    """Whether all parts have the same leaves, of the same shapes but for the images."""
    described = []
    for part in parts:
        values = [tuple(leaf.shape[1:]) if isinstance(leaf, Tensor) else leaf for leaf in part.leaves]
        described.append((str(part.form), values))
    return all(other == described[0] for other in described)


def _joined_leaf(parts: Sequence[_Part], at: int, images: int) -> Any:
    """Put the rows of one leaf into the order of the batch."""
    first = parts[0].leaves[at]
    if not isinstance(first, Tensor):
        return first
    whole = first.new_empty(images, *first.shape[1:])
    for part in parts:
        whole[part.numbers] = part.leaves[at]
    return whole
