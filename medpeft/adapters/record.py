"""What `apply` leaves on a model besides the adapters: a record of what was done, from which all else is read off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MedpeftError
from .adapter import Adapters, state_of

_NAME = "_medpeft"


@dataclass
class Applied:
    """What was applied to a model.

    Attributes:
        methods: Every method with its options, defaults filled in.
        sites: The additive ones' sites in order: method, name of the layer, name of its weight.
        selected: Existing parameters made trainable, by name, with the method that picked them; "head" for the head's.
        head: Names of the head's modules.
        batchnorm: "frozen" or "adapt".
        statistics: Names of the BatchNorm buffers that adapt.
        trained_before: Whether each parameter required a gradient before `apply`.
        base: The selected parameters and adapting buffers as they were, on the CPU; None if given up.
        seed: Seed of the adapters' initial values.
        dtype: dtype asked for the adapters, None for the default.
        enabled: False within `disabled`, where the base's values are in place.
    """

    methods: dict[str, dict[str, Any]]
    sites: list[tuple[str, str, str]]
    selected: dict[str, str]
    head: tuple[str, ...]
    batchnorm: str
    statistics: list[str]
    trained_before: dict[str, bool]
    base: dict[str, Tensor] | None
    seed: int = 0
    dtype: torch.dtype | None = None
    enabled: bool = True

    @property
    def name(self) -> str:
        """The methods as one name: "bias+norm"."""
        return "+".join(self.methods)


def applied(model: nn.Module) -> Applied | None:
    """What was applied to the model, None if nothing."""
    record = model.__dict__.get(_NAME)
    return record if isinstance(record, Applied) else None


def require_applied(model: nn.Module) -> Applied:
    """What was applied to the model.

    Raises:
        MedpeftError: nothing was.
    """
    record = applied(model)
    if record is not None:
        return record
    below = [name for name, module in model.named_modules() if applied(module) is not None]
    hint = f"its {below[0]!r} is: pass that." if below else "call medpeft.apply(model, method) first."
    raise MedpeftError(f"This {type(model).__name__} is not adapted: {hint}")


def set_applied(model: nn.Module, record: Applied | None) -> None:
    """Leave the record on the model, or take it off."""
    if record is None:
        model.__dict__.pop(_NAME, None)
    else:
        model.__dict__[_NAME] = record


def trained_tensors(model: nn.Module, record: Applied) -> Iterator[tuple[str, Tensor]]:
    """The base's own tensors that training changes: selected parameters and adapting BatchNorm buffers."""
    names = {*record.selected, *record.statistics}
    yield from ((name, p) for name, p in model.named_parameters() if name in names)
    yield from ((name, b) for name, b in model.named_buffers() if name in names)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """Every layer that has adapters: its name, itself, and they."""
    for name, layer in model.named_modules():
        adapters = layer._modules.get("adapters")
        if isinstance(adapters, Adapters):
            yield name, layer, adapters


def own_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of all adapters, each once, by their names in a file.

    What several adapters share is named as if the first of them held it.
    """
    yielded: set[int] = set()
    for layer_name, _, adapters in adapted_layers(model):
        for adapter_name, adapter in adapters.adapters():
            for key, tensor in state_of(adapter).items():
                if id(tensor) not in yielded:
                    yielded.add(id(tensor))
                    yield f"{layer_name}.adapters.{adapter_name}.{key}".lstrip("."), tensor


@dataclass(frozen=True)
class Adapted:
    """One look at an adapted model: what was applied to it, and every tensor that this brought or changes.

    Attributes:
        model: The model.
        record: What was applied to it.
        layers: Every layer that has adapters: its name, itself, and they.
        own: Parameters and persistent buffers of the adapters, by their names in a file.
        trained: The model's own tensors that training changes: selected parameters and adapting BatchNorm statistics.
    """

    model: nn.Module
    record: Applied
    layers: list[tuple[str, nn.Module, Adapters]]
    own: dict[str, Tensor]
    trained: dict[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> Adapted:
        """Look at a model.

        Raises:
            MedpeftError: it is not adapted.
        """
        record = require_applied(model)
        layers = list(adapted_layers(model))
        return cls(model, record, layers, dict(own_state(model)), dict(trained_tensors(model, record)))

    @property
    def saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the adapters' tensors and the trained ones of the model, by name."""
        return {**self.own, **self.trained}

    @property
    def acting(self) -> bool:
        """Whether the adapters act: False within `disabled` and `merged`."""
        if not self.record.enabled:
            return False
        return all(adapters.enabled for _, _, adapters in self.layers)
