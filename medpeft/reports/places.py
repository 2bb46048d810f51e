"""The places of an adapted model for `attribute`: what acts at each layer or block, and without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace, parameters_of
from ..adapters.adapters import Adapters
from ..adapters.record import Adapted
from ..architecture.caches import empty_caches
from ..architecture.layers import within
from ..architecture.network import Network
from ..errors import MedpeftError, require


@dataclass
class Switchable:
    """Adapters and selected parameters of one layer or block.

    Attributes:
        adapters: Each with those of its layer and its name there.
        values: The base's values of selected parameters and adapting statistics, by name.
        methods: Names of the methods, once each.
        parameters: How many parameters train.
    """

    adapters: list[tuple[Adapters, str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    methods: dict[str, None] = field(default_factory=dict)
    parameters: int = 0


def places_of(adapted: Adapted, base: dict[str, Tensor], by: str) -> dict[str, Switchable]:
    """Find the places of an adapted model, by name, in the order of its modules."""
    blocks = []
    if by == "block":
        blocks = Network(adapted.model, adapted.record.head).outermost_blocks
        require(
            bool(blocks), f"No kind of block is known in {type(adapted.model).__name__}: leave by='layer'."
        )
    places: dict[str, Switchable] = {}
    layers = _layers_by_adapter(adapted)
    for _, _, adapters in adapted.layers:
        for name, adapter in adapters.adapters():
            first = adapter.first if isinstance(adapter, SecondPlace) else adapter
            place = places.setdefault(_place_of(layers[first], blocks), Switchable())
            place.adapters.append((adapters, name))
            place.methods[first.method] = None
            place.parameters += sum(parameter.numel() for _, parameter in parameters_of(adapter))
    for name, tensor in adapted.trained.items():
        method = adapted.record.selected.get(name, "")
        if method == "head":
            continue
        place = places.setdefault(_place_of(name.rpartition(".")[0], blocks), Switchable())
        place.values[name] = base[name]
        if method:
            place.methods[method] = None
            place.parameters += tensor.numel()
    return places


def _layers_by_adapter(adapted: Adapted) -> dict[Adapter, str]:
    """Name the layer of every adapter."""
    layers = {}
    for name, _, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            layers[adapter] = name
    return layers


def _place_of(layer: str, blocks: Sequence[str]) -> str:
    """Name the block that a layer lies in, or the layer itself where it lies in none."""
    for block in blocks:
        if within(layer, [block]):
            return block
    return layer


@contextmanager
def off(copy: nn.Module, places: Sequence[Switchable], name: str) -> Iterator[None]:
    """Make places of a copy those of the base for a `with` block.

    Raises:
        MedpeftError: the model does not run then.
    """
    tensors: dict[str, Any] = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    trained = {}
    silent: dict[Adapters, list[str]] = {}
    for place in places:
        for adapters, adapter in place.adapters:
            silent.setdefault(adapters, []).append(adapter)
        for value in place.values:
            trained[value] = tensors[value].clone()
            tensors[value].copy_(place.values[value])
    empty_caches(copy)
    for adapters, names in silent.items():
        left = [other for other, _ in adapters.adapters() if other not in names]
        adapters.let_act(left)
        adapters.enabled = bool(left)
    try:
        yield
    except MedpeftError as error:
        raise MedpeftError(f"{name!r} cannot be switched off alone: {error}") from error
    finally:
        for adapters in silent:
            adapters.let_act([other for other, _ in adapters.adapters()])
            adapters.enabled = True
        for value, tensor in trained.items():
            tensors[value].copy_(tensor)
        empty_caches(copy)
