"""The head of an adapter: it may differ from the model's in the number of classes, and in nothing else."""

from __future__ import annotations

from torch import Tensor, nn

from ..adapters.record import Applied
from ..architecture.layers import within
from ..checkpoint.messages import clip
from ..errors import CheckpointError
from .base import Base

Shapes = dict[str, tuple[int, ...]]
"""Shapes of tensors by name."""


def zeros_for_head(base: Base, record: Applied, shapes: Shapes, source: str) -> dict[str, Tensor]:
    """Make the head's tensors for an adapter whose head has another number of classes.

    Args:
        base: The base.
        record: The adapter's.
        shapes: Shapes of its tensors by name.
        source: Its name in messages.

    Returns:
        Zeros by name, for the tensors of another shape than the base's.

    Raises:
        CheckpointError: the head differs in more than the number of classes of its last layer.
    """
    last: dict[str, str] = {}
    own: dict[str, nn.Parameter] = {}
    for name, parameter in base.plain.named_parameters():
        for head in record.head:
            if within(name, [head]):
                own[name] = parameter
                last[head] = name.rpartition(".")[0]
    zeros: dict[str, Tensor] = {}
    classes: dict[str, set[int]] = {}
    for name, parameter in own.items():
        shape = shapes.get(name, tuple(parameter.shape))
        layer = name.rpartition(".")[0]
        fits = shape == parameter.shape
        if layer in last.values() and len(shape) == parameter.ndim > 0:
            classes.setdefault(layer, set()).add(shape[0])
            fits = shape[1:] == parameter.shape[1:] and shape[0] > 0 and len(classes[layer]) == 1
        if not fits:
            raise CheckpointError(
                f"{source} has another head than this model: {clip(repr(name))} is {shape} there and "
                f"{tuple(parameter.shape)} here. Heads may differ in the number of classes alone, the first "
                "axis of their last layer."
            )
        if shape != parameter.shape:
            zeros[name] = nn.Parameter(parameter.new_zeros(shape), requires_grad=False)
    return zeros
