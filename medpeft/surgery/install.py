"""Bring adapters into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter, Adapters
from ..adapters.forward import Cover, Elsewhere, Tap, adapt_input, adapt_output
from ..architecture.site import Site


def attach(model: nn.Module, planned: Iterable[tuple[str, Site, Adapter]]) -> None:
    """Register each adapter at its site and hook it into the forward: `(method, site, adapter)` each."""
    by_layer: dict[str, list[tuple[str, Site, Adapter]]] = {}
    planned = list(planned)
    _tell_of_tokens([(site, adapter) for _, site, adapter in planned])
    for item in planned:
        by_layer.setdefault(item[1].name, []).append(item)
    for name, items in by_layer.items():
        layer = items[0][1].layer
        adapters = Adapters({method + site.key: adapter for method, site, adapter in items})
        layer.add_module("adapters", adapters)
        for reader in sorted({_reader(site) for _, site, adapter in items if adapter.usual_form == "weight"}):
            cover = Cover(name[len(reader) :].lstrip("."))
            module = model.get_submodule(reader)
            module.register_forward_pre_hook(cover.put, with_kwargs=True)
            module.register_forward_hook(cover.take, always_call=True)
        if any(adapter.on_input for _, _, adapter in items):
            layer.register_forward_pre_hook(adapt_input, with_kwargs=True)
        if any(adapter.on_output or adapter.switches for _, _, adapter in items):
            layer.register_forward_hook(adapt_output, prepend=True, with_kwargs=True)
        for _, _, adapter in items:
            _tap(layer, adapter)
            for other in adapter.others:
                # After the other module's own adapters.
                model.get_submodule(other).register_forward_hook(Elsewhere(adapters, adapter, other).act)


def _tell_of_tokens(placed: list[tuple[Site, Adapter]]) -> None:
    """Let each adapter know how many tokens others add to what it sees: within a block, or from one of a row to another."""
    for site, adapter in placed:
        if adapter.added:
            where = site.name.rpartition(".")[0] if type(adapter).forward is Adapter.forward else site.name
            for other_site, other in placed:
                inside = f"{other_site.name}.".startswith(f"{where}.")
                other.before += adapter.added if inside and other is not adapter else 0


def _reader(site: Site) -> str:
    return site.name if site.reader is None else site.reader


def _tap(layer: nn.Module, adapter: Adapter) -> None:
    if not adapter.taps:
        return
    tap = Tap(adapter)
    layer.register_forward_pre_hook(tap.clear)
    for path in adapter.taps:
        layer.get_submodule(path).register_forward_pre_hook(tap.store, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Take every adapter and every hook of medpeft's out of the model."""
    for module in model.modules():
        if isinstance(module._modules.get("adapters"), Adapters):
            del module._modules["adapters"]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                _unhook(module, key)


def _is_ours(hook: Callable[..., Any]) -> bool:
    return hook in (adapt_input, adapt_output) or isinstance(getattr(hook, "__self__", None), (Cover, Tap, Elsewhere))


def _unhook(module: nn.Module, key: int) -> None:
    for hooks in (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    ):
        hooks.pop(key, None)
