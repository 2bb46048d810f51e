"""What `apply` leaves on a model besides the adapters: a record of what was done, and one look at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MedpeftError
from .adapter import Adapters, state_of

_NAME = "_medpeft"


@dataclass
class Applied:
    """Record of what was applied to a model.

    Attributes:
        methods: Every method with its options, defaults filled in.
        sites: The sites of the adapters in order: method, name of the layer, name of its weight.
        selected: Existing parameters made trainable, by name, with the method that picked them or "head".
        head: Names of the head's modules.
        batchnorm: "frozen" or "adapt".
        statistics: Names of the BatchNorm buffers that adapt.
        trained_before: Whether each parameter required a gradient before `apply`.
        base: The selected parameters and adapting buffers as they were, on the CPU; None if given up.
        seed: Seed of the adapters' initial values.
        dtype: dtype asked for the adapters, None for the default.
        enabled: False within `disabled`, where the base's values are in place.
        samples: A sample of each tensor of the base that is neither selected nor adapts; see `samples.py`.
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
    samples: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The methods as one name: "bias+norm"."""
        return "+".join(self.methods)

    def to_json(self) -> dict[str, Any]:
        """Describe what was applied by the fields that all models adapted in the same way have in common.

        Returns:
            JSON, but for the options of the methods, which stay as they are.
        """
        dtype = None
        if self.dtype is not None:
            dtype = str(self.dtype).removeprefix("torch.")
        return {
            "methods": self.methods,
            "sites": [list(site) for site in self.sites],
            "selected": self.selected,
            "head": list(self.head),
            "batchnorm": self.batchnorm,
            "statistics": self.statistics,
            "dtype": dtype,
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Applied:
        """Read what `to_json` returned; a site that stands there twice is taken once."""
        dtype = None
        if description["dtype"] is not None:
            dtype = getattr(torch, description["dtype"])
        sites: dict[tuple[str, str, str], None] = {}
        for method, layer, weight in description["sites"]:
            sites[method, layer, weight] = None
        return cls(
            methods=dict(description["methods"]),
            sites=list(sites),
            selected=dict(description["selected"]),
            head=tuple(description["head"]),
            batchnorm=description["batchnorm"],
            statistics=list(description["statistics"]),
            trained_before={},
            base={},
            seed=description["seed"],
            dtype=dtype,
        )


def applied(model: nn.Module) -> Applied | None:
    """Return the record of what was applied to the model, None if nothing was."""
    record = model.__dict__.get(_NAME)
    if isinstance(record, Applied):
        return record
    return None


def require_applied(model: nn.Module) -> Applied:
    """Return the record of what was applied to the model.

    Raises:
        MedpeftError: nothing was.
    """
    record = applied(model)
    if record is not None:
        return record
    hint = "call medpeft.apply(model, method) first."
    inside = adapted_inside(model)
    if inside is not None:
        hint = f"its {inside!r} is: pass that."
    raise MedpeftError(f"This {type(model).__name__} is not adapted: {hint}")


def adapted_inside(model: nn.Module) -> str | None:
    """Return the name of the first module of the model to which something was applied, None without one."""
    for name, module in model.named_modules():
        if applied(module) is not None:
            return str(name)
    return None


def set_applied(model: nn.Module, record: Applied | None) -> None:
    """Leave the record on the model, or take it off."""
    if record is None:
        model.__dict__.pop(_NAME, None)
    else:
        model.__dict__[_NAME] = record


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own parameters and persistent buffers, each once by its first name; no adapter's."""
    seen: set[int] = set()
    for prefix, module in _own_modules(model, ""):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield prefix + name, tensor


def _own_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Adapters):
            yield from _own_modules(child, f"{prefix}{name}.")


def trained_tensors(model: nn.Module, record: Applied) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own tensors that training changes: selected parameters and BatchNorm buffers."""
    names = {*record.selected, *record.statistics}
    for name, parameter in model.named_parameters():
        if name in names:
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name in names:
            yield name, buffer


class AdaptedLayer(NamedTuple):
    """A layer with adapters.

    Attributes:
        name: Its name in the model.
        layer: The layer.
        adapters: Its adapters.
    """

    name: str
    layer: nn.Module
    adapters: Adapters


def adapted_layers(model: nn.Module) -> Iterator[AdaptedLayer]:
    """Yield every layer that has adapters."""
    for name, layer in model.named_modules():
        adapters = layer._modules.get("adapters")
        if isinstance(adapters, Adapters):
            yield AdaptedLayer(name, layer, adapters)


def own_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of all adapters, each once, by their names in a file.

    A name is LAYER.adapters.METHOD.KEY. What several adapters share is named as if the first of them held it.
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
        layers: Every layer that has adapters.
        own: Parameters and persistent buffers of the adapters, by their names in a file.
        trained: The model's own tensors that training changes: selected parameters and BatchNorm buffers.
    """

    model: nn.Module
    record: Applied
    layers: list[AdaptedLayer]
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
        """Everything that a checkpoint holds, by name: the adapters' tensors and the model's trained ones."""
        return {**self.own, **self.trained}

    @property
    def acting(self) -> bool:
        """Whether the adapters act: False within `disabled` and `merged`."""
        if not self.record.enabled:
            return False
        return all(adapters.enabled for _, _, adapters in self.layers)
