"""Outputs of a model on an example, compared before and after merging."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.aside import Settled
from ..errors import MedpeftError


@torch.no_grad()
def outputs_of(model: nn.Module, example_input: Any) -> list[Tensor]:
    """Run the model in eval mode and list the tensors of its output.

    Raises:
        MedpeftError: it does not run on the input.
    """
    modes = [(module, module.training) for module in model.modules()]

    def settle() -> None:
        for module, mode in modes:
            module.training = mode

    settled = Settled(settle)
    with settled, settled:
        for module, _ in modes:
            # A frozen BatchNorm would note a call of `eval` as what the user asked for.
            module.training = False
        try:
            output = model(*example_input) if isinstance(example_input, tuple) else model(example_input)
        except MedpeftError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise MedpeftError(f"{type(model).__name__} does not run on example_input: {reason}") from error
    if hasattr(output, "__dataclass_fields__"):
        output = dict(vars(output))  # torch knows how to flatten a dict.
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def largest_difference(before: list[Tensor], after: list[Tensor]) -> float:
    """Largest difference of two lists of outputs, relative to the largest element of each."""
    largest = 0.0
    for expected, computed in zip(before, after, strict=True):
        if expected.numel():
            wide = expected.double()
            difference = (wide - computed.double()).abs().max() / wide.abs().max().clamp(min=1e-30)
            largest = max(largest, float(difference))
    return largest
