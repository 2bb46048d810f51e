"""Wiring: put an adapting forward on a layer, and take it off again.

The forward is an attribute of the instance that survives deepcopy and pickle.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from ..errors import MedpeftError
from .adapters import Adapters
from .handover import Handover
from .presence import Branch


@dataclass(frozen=True)
class Wiring:
    """Facts about a layer that its adapting forward needs.

    Attributes:
        root: Whether the layer is the model that was adapted.
        reads: Paths of layers below it whose weights it reads without calling them.
        input_names: Names of the positional inputs of its forward, in order.
        previous: A `forward` that someone else had put on the instance before, None for the class's own.
        overrides: Attributes, tensors apart, that the stand-in has in place of the layer's: a hook that keeps
            torch off its fused kernel, for one.
        handovers: The handovers that are open while the layer runs.
        apart: Whether its bias trains apart from its weight; see `bias_gradients.py`.
        direct: Whether the forward of its class can run on the layer itself: there is no previous forward, no
            weight read below, no override.
        branches: On the model, the ways to all modules on which its adapters depend; see `presence.py`.
        installation: Key of the installation that it came with. A forward of an earlier one, which somebody
            has wrapped and the present one calls, lets no adapters act: they have acted already.
    """

    root: bool = False
    reads: tuple[str, ...] = ()
    input_names: tuple[str, ...] = ()
    previous: Callable[..., Any] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    handovers: tuple[Handover, ...] = ()
    apart: bool = False
    direct: bool = False
    branches: tuple[Branch, ...] = ()
    installation: str = ""


_holders: WeakKeyDictionary[nn.Module, WeakSet[object]] = WeakKeyDictionary()
"""Who needs a model to stay wired."""


def acting(layer: nn.Module) -> Adapters | None:
    """Return the layer's adapters, None if it has none or they are switched off.

    Those of the model may be shared modules alone.
    """
    adapters = layer._modules.get("adapters")
    if isinstance(adapters, Adapters) and adapters.enabled:
        return adapters
    return None


def wire(layer: nn.Module, forward: Callable[..., Any], wiring: Wiring) -> None:
    """Replace the layer's forward, inside the one that accelerate may have put around it.

    Args:
        layer: The layer.
        forward: A function of a module, `(layer, wiring, *args, **kwargs)`.
        wiring: Facts about the layer. `input_names`, `previous` and `direct` are filled in.
    """
    slot, present, previous = _slot(layer), wiring_of(layer), None
    if present is not None:
        previous = present.previous
    elif slot == "forward":
        previous = layer.__dict__.get("forward")
    input_names = _input_names(type(layer))  # type: ignore[arg-type]  # a class is hashable
    direct = previous is None and not wiring.reads and not wiring.overrides
    filled_in = replace(wiring, input_names=input_names, previous=previous, direct=direct)
    layer.__dict__[slot] = _bound(forward, layer, filled_in)
    layer.__dict__["_replicate_for_data_parallel"] = functools.partial(replicated, layer)
    layer.__dict__["__prepare_scriptable__"] = refuse_script


def unwire(layer: nn.Module) -> None:
    """Give the layer its own forward back.

    A forward that someone wrapped around ours later stays; ours then runs the plain forward. So it does on a
    model that is to stay wired.
    """
    wiring, slot = wiring_of(layer), _slot(layer)
    if wiring is not None and _holders.get(layer):
        wire(layer, layer.__dict__[slot].func, Wiring(root=True))
        return
    layer.__dict__.pop("_replicate_for_data_parallel", None)
    layer.__dict__.pop("__prepare_scriptable__", None)
    if wiring is None:
        return
    if slot == "_old_forward":
        layer.__dict__[slot] = MethodType(type(layer).forward, layer)
    elif wiring.previous is None:
        del layer.__dict__[slot]
    else:
        layer.__dict__[slot] = wiring.previous


def stay_wired(model: nn.Module, forward: Callable[..., Any], holder: object) -> None:
    """Keep a model wired, with adapters or without, for as long as a holder lives.

    Nobody counts the forwards of a model that is not wired, so whoever adapts it cannot wait for their end.

    Args:
        model: The model.
        forward: What it is wired with while it has no adapters.
        holder: Whoever needs this.
    """
    _holders.setdefault(model, WeakSet()).add(holder)
    if wiring_of(model) is None:
        wire(model, forward, Wiring(root=True))


def wiring_of(layer: nn.Module) -> Wiring | None:
    """Return the wiring of a layer, None if it has none or someone else's function hides it."""
    forward = layer.__dict__.get(_slot(layer))
    if not isinstance(forward, functools.partial) or len(forward.args) != 2 or forward.args[0] is not layer:
        return None
    wiring = forward.args[1]
    return wiring if isinstance(wiring, Wiring) else None


def plain_forward(layer: nn.Module) -> Callable[..., Any] | None:
    """Return the forward that somebody else has put on a layer, None where it is that of its class."""
    forward = layer.__dict__.get(_slot(layer))
    if forward is None:
        return None
    wiring = wiring_of(layer)
    if wiring is not None:
        return wiring.previous
    if forward == MethodType(type(layer).forward, layer):
        return None
    return forward  # type: ignore[no-any-return]  # what is called like a method


def is_wired(layer: nn.Module) -> bool:
    """Whether the layer's adapters reach its forward. A forward wrapped around ours counts too."""
    return wiring_of(layer) is not None or callable(layer.__dict__.get("forward"))


def branches_of(model: nn.Module) -> tuple[Branch, ...]:
    """Return the ways to the modules on which a model's adapters depend, as far as they are known."""
    wiring = wiring_of(model)
    if wiring is None:
        return ()
    return wiring.branches


def replicated(layer: nn.Module) -> nn.Module:
    """Replicate an adapted layer for `nn.DataParallel`.

    A replica has all attributes of its original, so its forward must be bound anew.
    """
    replica: nn.Module = type(layer)._replicate_for_data_parallel(layer)
    wiring, slot = wiring_of(layer), _slot(layer)
    if wiring is not None:
        replica.__dict__[slot] = _bound(layer.__dict__[slot].func, replica, wiring)
    replica.__dict__["_replicate_for_data_parallel"] = functools.partial(replicated, replica)
    return replica


def refuse_script() -> None:
    """Raise `MedpeftError` where torch asks a module to prepare for TorchScript."""
    raise MedpeftError(
        "torch.jit.script cannot compile an adapted model: call medpeft.merge first (for selective methods "
        "too), or use torch.export, torch.compile or torch.jit.trace. Nor can it compile the model of a "
        "medpeft.Bank."
    )


def _slot(layer: nn.Module) -> str:
    """Name of the attribute with the innermost forward, which accelerate moves aside and later puts back."""
    if "_old_forward" in layer.__dict__ and "_hf_hook" in layer.__dict__:
        return "_old_forward"
    return "forward"


def _bound(forward: Callable[..., Any], layer: nn.Module, wiring: Wiring) -> Any:
    bound = functools.partial(forward, layer, wiring)
    if wiring.root:
        # Trainers and exporters inspect the model's forward for the names of its inputs.
        bound.__dict__["__signature__"] = _signature(layer, wiring)
    return bound


def _signature(layer: nn.Module, wiring: Wiring) -> inspect.Signature | None:
    """Signature of the plain forward, without annotations: some of them cannot be pickled."""
    plain = wiring.previous or MethodType(type(layer).forward, layer)
    try:
        signature = inspect.signature(plain)
    except (TypeError, ValueError):
        return None
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return inspect.Signature(parameters)


@functools.cache
def _input_names(cls: type[nn.Module]) -> tuple[str, ...]:
    """Names of the inputs that `cls.forward` takes by position, `self` left out."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    return tuple(parameter.name for parameter in parameters if parameter.kind in named)
