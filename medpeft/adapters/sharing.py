"""Modules that several adapters share: registered once, held by all, and found again in the replicas of `nn.DataParallel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter import Adapter, Adapters

SHARED = "shared"
"""Name of the shared modules among the adapters of the module that registers them."""


def register_shared(model: nn.Module, adapters: list[tuple[nn.Module, Adapter]]) -> None:
    """Register what adapters share, once: on the model, which FSDP2 gathers before all of its layers.

    Args:
        model: The model. Where it is a container, whose children are its layers, the first layer that shares
            takes its place.
        adapters: Every adapter with its layer.
    """
    names: dict[nn.Module, str] = {}
    for layer, adapter in adapters:
        for attribute, module in adapter.shared.items():
            if module in names or isinstance(module, Adapter):
                continue
            home = layer if isinstance(model, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) else model
            names[module] = f"{adapter.method}_{attribute}_{len(names)}"
            _shared_modules(home)[names[module]] = module


def _shared_modules(home: nn.Module) -> nn.ModuleDict:
    if not isinstance(home._modules.get("adapters"), Adapters):
        home.add_module("adapters", Adapters({}))
    adapters: Any = home._modules["adapters"]
    if SHARED not in adapters:
        adapters[SHARED] = nn.ModuleDict()
    shared: nn.ModuleDict = adapters[SHARED]
    return shared


def share_within_replica(model: nn.Module) -> None:
    """Let the adapters of a replica of the model hold the replica's shared modules in place of the original's."""
    # A replica has the very dicts of hooks that its original has.
    replicas = {id(module._forward_hooks): module for module in model.modules()}
    for module in model.modules():
        if isinstance(module, Adapter):
            shared = {name: replicas[id(original._forward_hooks)] for name, original in module.shared.items()}
            module.__dict__["shared"] = shared
