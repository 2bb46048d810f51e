"""A layer's plain forward on other tensors than its own, without touching the layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn

from ..architecture.weight_reads import sets_attributes
from .wiring import Wiring, acting, wiring_of

Change = TypeVar("Change")

Changes = Mapping[str, Mapping[str, Any]]
"""Tensors, and other attributes, by the path of their layer ("" for the module itself) and their own name."""


def run_with(
    layer: nn.Module,
    changes: Changes,
    previous: Callable[..., Any] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a layer's plain forward on changed tensors.

    Args:
        layer: The layer.
        changes: The tensors; empty to run the layer as it is.
        previous: A forward that someone else has put on the layer, None for the forward of its class.
        args: Inputs by position.
        kwargs: Inputs by keyword.
    """
    if not changes:
        if previous is not None:
            return previous(*args, **kwargs)
        return type(layer).forward(layer, *args, **kwargs)
    copy = stand_in(layer, changes)
    if previous is None:
        output = type(layer).forward(copy, *args, **kwargs)
    else:
        bound = rebound(previous, layer, copy)
        assert bound is not None  # Building an adapter refuses a forward that cannot be bound.
        output = bound(*args, **kwargs)
    cls: Any = type(layer)  # mypy does not see that a class is hashable.
    if not torch.compiler.is_compiling() and sets_attributes(cls):
        _keep_attributes(layer, copy, changes)
    return output


def stand_in(module: nn.Module, changes: Changes) -> nn.Module:
    """Make an object of the module's class that shares everything with the module but some tensors.

    If a tensor belongs to a layer below the module, that layer gets a stand-in too.
    """
    copy = sharing_all(module)
    # A plain attribute hides a registered tensor: nn.Module asks its own dicts only for what is not there.
    copy.__dict__.update(changes.get("", {}))
    if changes.keys() != {""}:
        replace_below(copy, changes, _stand_in_below)
    return copy


def sharing_all(module: nn.Module) -> nn.Module:
    """Make an object of the module's class that shares everything with the module."""
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy


def replace_below(
    copy: nn.Module, changes: Mapping[str, Change], make: Callable[[nn.Module, dict[str, Change]], nn.Module]
) -> None:
    """Give an object that shares everything with a module other children, where changes lie below them.

    Args:
        copy: The object; the module keeps its children.
        changes: By the path from the module; "" is the module itself, and not looked at.
        make: Makes the other child of a child and of the changes by the path from there.
    """
    below: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        if path:
            child, _, rest = path.partition(".")
            below.setdefault(child, {})[rest] = change
    if not below:
        return
    modules = dict(copy._modules)
    for name, changes_below in below.items():
        child_module = modules[name]
        assert child_module is not None
        modules[name] = make(child_module, changes_below)
    copy.__dict__["_modules"] = modules


def _stand_in_below(module: nn.Module, changes: Changes) -> nn.Module:
    """Make a stand-in of a layer whose weight a parent reads.

    If everything that its forward would adapt is adapted already, a call runs the plain forward.
    """
    copy = stand_in(module, changes)
    wiring = wiring_of(module)
    adapters = acting(module)
    covered = wiring is not None and wiring.previous is None and set(wiring.reads) <= set(changes)
    if covered and (
        adapters is None or ("" in changes and not adapters.order.leaving and not adapters.order.entering)
    ):
        copy.__dict__.pop("forward", None)
    return copy


def rebound(forward: Callable[..., Any], layer: nn.Module, copy: nn.Module) -> Callable[..., Any] | None:
    """Bind a forward that was put on a layer to a stand-in; None if that is impossible, as for a closure.

    With ours goes the one that somebody else had put there before.
    """
    if isinstance(forward, MethodType) and forward.__self__ is layer:
        return MethodType(forward.__func__, copy)
    if not isinstance(forward, functools.partial) or not forward.args or forward.args[0] is not layer:
        return None
    others = list(forward.args[1:])
    if others and isinstance(others[0], Wiring) and others[0].previous is not None:
        previous = rebound(others[0].previous, layer, copy)
        if previous is None:
            return None
        others[0] = replace(others[0], previous=previous)
    return functools.partial(forward.func, copy, *others, **forward.keywords)


def _keep_attributes(layer: nn.Module, copy: nn.Module, changes: Changes) -> None:
    """Bring attributes that a forward set on the stand-in, such as an attention map, to the layer."""
    changed = changes.get("", {})
    missing = object()
    for name, value in copy.__dict__.items():
        if name in changed or name == "_modules":
            continue
        if layer.__dict__.get(name, missing) is not value:
            layer.__dict__[name] = value
