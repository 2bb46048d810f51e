"""The record that `apply` leaves on a model, and one look at everything in an adapted model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import MedpeftError
from .adapter import Adapter, state_of
from .adapters import Adapters

_NAME = "_medpeft"


BatchNormPolicy = Literal["frozen", "adapt"]


@dataclass
class Aside:
    """What the values in a model are in the place of, for as long as that is not back; see `aside.py`.

    Attributes:
        action: The call that put other values in: "disabled", for one.
        values: By name, what tensors held that hold other values now.
        tensors: By name, the tensors in whose place others are now; None where there was none.
        strength: The strength at which the methods act meanwhile; None where they are merged.
    """

    action: str
    values: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor | None] = field(default_factory=dict)
    strength: float | None = None


@dataclass
class Applied:
    """Record of the methods applied to a model, and of their effects on it.

    Attributes:
        methods: Every method with its options, defaults filled in.
        sites: The sites of the adapters in order: method, name of the layer, name of its weight.
        selected: Existing parameters made trainable, by name, with the method that picked them or "head".
        head: Names of the head's modules.
        batchnorm: "frozen" or "adapt".
        statistics: Names of the BatchNorm buffers that adapt.
        trained_before: Whether each parameter required a gradient before `apply`.
        base: Original values of the selected parameters and adapting buffers, on the CPU; None if not kept.
        seed: Seed of the adapters' initial values.
        dtype: dtype asked for the adapters, None for the default.
        depth: Share of the model's blocks in which layers were taken, the last ones.
        samples: A sample of each tensor of the base that is neither selected nor adapts; see `samples.py`.
        aside: The trained values while others are in their place, as within `disabled`; else None.
    """

    methods: dict[str, dict[str, Any]]
    sites: list[tuple[str, str, str]]
    selected: dict[str, str]
    head: tuple[str, ...]
    batchnorm: BatchNormPolicy
    statistics: list[str]
    trained_before: dict[str, bool]
    base: dict[str, Tensor] | None
    seed: int = 0
    dtype: torch.dtype | None = None
    depth: float = 1.0
    samples: dict[str, Tensor] = field(default_factory=dict)
    aside: Aside | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The methods as one name: "bias+norm"."""
        return "+".join(self.methods)

    def to_json(self) -> dict[str, Any]:
        """Describe the record by the fields that are the same in every model adapted in this way.

        Returns:
            JSON, except for the options of the methods, which stay as they are.
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
            "depth": self.depth,
        }

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Applied:
        """Read the output of `to_json`. A site that is listed twice is taken once."""
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
            depth=description["depth"],
        )


def applied(model: nn.Module) -> Applied | None:
    """Return the model's record, None if nothing was applied to it."""
    record = model.__dict__.get(_NAME)
    if isinstance(record, Applied):
        return record
    return None


def require_model(model: object, path: object = None) -> None:
    """Raise `MedpeftError` unless the first argument of a public function is a model.

    Args:
        model: The argument.
        path: The argument after it, where that is a path: the two may have changed places.
    """
    if isinstance(model, nn.Module):
        return
    fault = f"{type(model).__name__} is no torch.nn.Module: pass the model itself."
    if isinstance(path, nn.Module):
        fault = "The model comes first and the path second: exchange the two."
    raise MedpeftError(fault)


def require_applied(model: nn.Module) -> Applied:
    """Return the model's record.

    Raises:
        MedpeftError: nothing was applied to it, or it is no model.
    """
    require_model(model)
    record = applied(model)
    if record is not None:
        return record
    hint = "call medpeft.apply(model, method) first."
    inside = adapted_inside(model)
    if inside is not None:
        hint = f"its {inside!r} is: pass that."
    raise MedpeftError(f"This {type(model).__name__} is not adapted: {hint}")


def adapted_inside(model: nn.Module) -> str | None:
    """Return the name of the first adapted module in the model, None without one."""
    for name, module in model.named_modules():
        if applied(module) is not None:
            return str(name)
    return None


def set_applied(model: nn.Module, record: Applied | None) -> None:
    """Put a record on the model, or take it off with None."""
    if record is None:
        model.__dict__.pop(_NAME, None)
    else:
        model.__dict__[_NAME] = record


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the model's own parameters and persistent buffers, each once by its first name.

    Those of adapters are left out.
    """
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
    """Yield the parameters and persistent buffers of all adapters, each once, by their names in a file."""
    return named_state(_named_adapters(model))


def _named_adapters(model: nn.Module) -> Iterator[tuple[str, str, Adapter]]:
    """Yield every adapter of a model after the name of its layer and its own name there."""
    for layer_name, _, adapters in adapted_layers(model):
        for adapter_name, adapter in adapters.adapters():
            yield layer_name, adapter_name, adapter


def named_state(adapters: Iterable[tuple[str, str, Adapter]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and persistent buffers of adapters, each once, by their names in a file.

    A name is LAYER.adapters.NAME.KEY. A shared tensor has its name in the first adapter that uses it.

    Args:
        adapters: Each adapter after the name of its layer and its own name there.
    """
    yielded: set[int] = set()
    for layer_name, adapter_name, adapter in adapters:
        for key, tensor in state_of(adapter).items():
            if id(tensor) not in yielded:
                yielded.add(id(tensor))
                yield f"{layer_name}.adapters.{adapter_name}.{key}".lstrip("."), tensor


@dataclass(frozen=True)
class Adapted:
    """One look at an adapted model: its record, its adapters, and every tensor that trains.

    Attributes:
        model: The model.
        record: The record of what was applied.
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
        """All tensors of a checkpoint, by name: those of the adapters and the trained ones of the model."""
        return {**self.own, **self.trained}

    @property
    def acting(self) -> bool:
        """Whether the model is as trained: False within `disabled`, `scaled` and `merged`."""
        if self.record.aside is not None:
            return False
        return all(adapters.enabled for _, _, adapters in self.layers)
