"""How adapters get into a forward pass: an adapted layer's own `forward` does it all.

`layer.forward` is an attribute of the instance, a `functools.partial` of `adapted_forward`; the layer keeps its class, its
parameters and every key of its `state_dict`. A changed weight is never put into the layer: the layer's forward runs on a
stand-in, an object of the same class that shares everything with the layer but the changed tensors, and that lives for this
one call. So nothing is left behind after an interrupt, and threads, processes, and calls within calls do not meet.

What is put on a layer must survive deepcopy and pickle, so it is made of module-level functions and plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from . import running
from .adapter import Adapter, Adapters, FlexibleAdapter, autocasts
from .bias_gradients import run_apart
from .sharing import share_within_replica
from .stand_in import run_with
from .wiring import Wiring, acting


def adapted_forward(layer: nn.Module, wiring: Wiring, /, *args: Any, **kwargs: Any) -> Any:
    """Compute what an adapted layer does: its input changed, itself with its weight changed, its output changed."""
    if not wiring.root or torch.compiler.is_compiling():
        return _adapted(layer, wiring, args, kwargs)
    if "_is_replica" in layer.__dict__:
        share_within_replica(layer)
    token = running.Token()
    try:
        running.begin(layer, token)
        return _adapted(layer, wiring, args, kwargs)
    finally:
        running.end(layer, token)


def _adapted(layer: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    adapters = acting(layer)
    if adapters is None:
        if wiring.apart:
            return run_apart(layer, args, kwargs)
        return _run(layer, wiring, {}, args, kwargs)
    handovers: list[Any] = [adapters._modules[name] for name in adapters.handovers]
    for adapter in handovers:
        adapter.handover.open()
    try:
        if adapters.entering:
            args, kwargs = _enter(adapters, wiring, args, kwargs)
        return _leave(layer, adapters, wiring, args, kwargs)
    finally:
        for adapter in handovers:
            adapter.handover.close()


def _enter(
    adapters: Adapters, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let the adapters change the layer's inputs."""
    others = dict(kwargs)
    if args:
        x, first, names = args[0], "", _names_of(args, wiring)
        others.update(zip(names, args[1:], strict=True))
    else:
        first, names = _first_name(kwargs, wiring), []
        x = others.pop(first)
    for name in adapters.entering:
        adapter: Adapter = adapters._modules[name]  # type: ignore[assignment]  # these names are of adapters
        x = adapter.enter(x, others)
    if args:
        args = (x, *[others.pop(name) for name in names])
        return args, others
    return (), {first: x, **others}


def _names_of(args: tuple[Any, ...], wiring: Wiring) -> list[str]:
    """Names of all positional inputs but the first; numbers where the forward has no names for them."""
    names = list(wiring.inputs[1 : len(args)])
    names += [str(number) for number in range(len(names) + 1, len(args))]
    return names


def _first_name(kwargs: dict[str, Any], wiring: Wiring) -> str:
    """Name of the layer's first input, where all are given by keyword, in whatever order."""
    for name in wiring.inputs:
        if name in kwargs:
            return name
    return next(iter(kwargs))


def _leave(layer: nn.Module, adapters: Adapters, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the layer with its weight changed, and let the adapters change its output."""
    x: Any = None
    if args:
        x = args[0]
    elif kwargs:
        x = kwargs[_first_name(kwargs, wiring)]
    on_weight: list[Adapter] = []
    output_of: list[Adapter] = []
    computes: FlexibleAdapter | None = None
    for name in adapters.on_weight:
        adapter = adapters._modules[name]
        if not isinstance(adapter, FlexibleAdapter) or not isinstance(x, Tensor):
            on_weight.append(adapter)  # type: ignore[arg-type]  # these names are of adapters
            continue
        form = adapter.form(x, own_tensor(layer, adapter._weight))
        if form == "output":
            output_of.append(adapter)
        elif form == "compute" and len(adapters.on_weight) == 1:
            computes = adapter
        else:
            # The layer cannot be left out where another adapter changes its weight.
            on_weight.append(adapter)
    if computes is not None:
        y = output = computes.compute(x, own_tensor(layer, computes._bias))
    else:
        tensors: dict[str, Tensor] = {}
        if on_weight:
            tensors = tensors_for(layer, adapters, on_weight, x)
        output = _run(layer, wiring, tensors, args, kwargs)
        y = output[0] if isinstance(output, tuple) else output
    for adapter in output_of:
        y = adapter(x, y)
    for name in adapters.leaving:
        y = adapters._modules[name](x, y)
    if isinstance(output, tuple):
        return (y, *output[1:])
    return y


def tensors_for(layer: nn.Module, adapters: Adapters, on_weight: list[Adapter], x: Any = None) -> dict[str, Tensor]:
    """Compute the adapted tensors of a layer, in its own precision and dtype."""
    with _full_precision(layer):
        tensors = adapters.adapted_tensors(layer, on_weight)
    dtype = _dtype(layer, x)
    if dtype is not None:
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(dtype)
    return tensors


def _dtype(layer: nn.Module, x: Any) -> torch.dtype | None:
    """The dtype of the layer's parameters; a norm without parameters computes in its input's dtype."""
    for parameter in layer._parameters.values():
        if parameter is not None:
            return parameter.dtype
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.dtype
    return None


def _full_precision(layer: nn.Module) -> Any:
    """Autocast off: a weight is adapted in its own precision, as merging does."""
    for parameter in layer.parameters():
        device = parameter.device.type
        return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()
    return torch.autocast("cpu", enabled=False) if autocasts("cpu") else nullcontext()


def _run(layer: nn.Module, wiring: Wiring, tensors: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the layer's plain forward, on changed tensors of its own and of the layers whose weights it reads."""
    changes: dict[str, Mapping[str, Any]] = {}
    if wiring.slow:
        # torch takes its fused path only where nothing has hooks. This one is never called.
        tensors = {**tensors, "_forward_hooks": {0: None}}
    if tensors:
        changes[""] = tensors
    for path in wiring.reads:
        read = layer.get_submodule(path)
        adapters = acting(read)
        if adapters is not None and adapters.on_weight:
            on_weight: list[Any] = [adapters._modules[name] for name in adapters.on_weight]
            changes[path] = tensors_for(read, adapters, on_weight)
    return run_with(layer, changes, wiring.replaced, args, kwargs)
