"""Draw a head anew, for a file whose head is that of another task."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.record import Applied
from ..errors import CheckpointError


def draw_head(model: nn.Module, record: Applied) -> dict[str, Tensor]:
    """Draw the head anew by its layers' `reset_parameters`; model and torch's random state stay as they are.

    Raises:
        CheckpointError: a layer of the head has parameters and does not say how to draw them.
    """
    drawn: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.seed % 2**63)
        for name in record.head:
            head = copy.deepcopy(model.get_submodule(name)).cpu()
            for path, layer in head.named_modules(prefix=name):
                parameters = dict(layer.named_parameters(recurse=False))
                reset: Any = getattr(layer, "reset_parameters", None)
                if parameters and not callable(reset):
                    raise CheckpointError(
                        f"head='reinit' cannot draw {path!r} anew ({type(layer).__name__}): use head='skip'."
                    )
                if parameters:
                    reset()
                for key, parameter in parameters.items():
                    drawn[f"{path}.{key}"] = parameter.detach()
    return {name: tensor for name, tensor in drawn.items() if name in record.selected}
