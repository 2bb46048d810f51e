"""Modules that several adapters share: registered once, and held by all of them.

A replica of `nn.DataParallel` gets replicas of the shared modules too.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import Adapter
from .adapters import Adapters

SHARED = "shared"
"""Name under which an `Adapters` registers shared modules."""


def register_shared(model: nn.Module, adapters: list[tuple[nn.Module, Adapter]]) -> None:
    """Register every shared module once, on the model: FSDP2 gathers the model before all of its layers.

    Args:
        model: The model. If it is a container, its children are its layers, and the first layer that shares
            a module registers it instead.
        adapters: Every adapter with its layer.
    """
    names: dict[nn.Module, str] = {}
    for layer, adapter in adapters:
        for attribute, module in adapter.shared.items():
            if module in names or isinstance(module, Adapter):
                continue
            home = home_of(model, layer)
            names[module] = f"{adapter.method}_{attribute}_{len(names)}"
            _shared_modules(home)[names[module]] = module


def home_of(model: nn.Module, layer: nn.Module) -> nn.Module:
    """Where a module is registered that the adapter of this layer is the first to share."""
    if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return layer
    return model


def _shared_modules(home: nn.Module) -> nn.ModuleDict:
    if not isinstance(home._modules.get("adapters"), Adapters):
        home.add_module("adapters", Adapters({}))
    adapters: Any = home._modules["adapters"]
    if SHARED not in adapters:
        adapters[SHARED] = nn.ModuleDict()
    shared: nn.ModuleDict = adapters[SHARED]
    return shared


def share_within_replica(model: nn.Module) -> None:
    """Replace the original's shared modules in the adapters of a replica by the replica's."""
    # A replica has the very same dicts of hooks as its original, which identify it.
    replicas = {id(module._forward_hooks): module for module in model.modules()}
    for module in model.modules():
        if isinstance(module, Adapter):
            shared = {name: replicas[id(original._forward_hooks)] for name, original in module.shared.items()}
            module.__dict__["shared"] = shared
