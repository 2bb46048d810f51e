"""Adapters in a forward pass: an adapted layer's own `forward` does it all.

`layer.forward` is an attribute of the instance, a `functools.partial` of `adapted_forward`. The layer keeps
its class, its parameters and every key of its `state_dict`.

A changed weight is never put into the layer. The plain forward runs on a stand-in instead: an object of the
same class, made for this one call, that shares everything with the layer but the changed tensors. So an
interrupt leaves nothing behind, and threads, processes and nested calls do not disturb each other.

Most adapters change the output, LoRA among them, which is cheap. The weight is changed only where the output
cannot be: by DoRA for one, or where a parent reads the weight without calling its layer.

The forward must survive deepcopy and pickle, so it is made of module-level functions and plain data.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from . import running
from .adapted_tensors import adapted_tensors
from .adapter import Adapter, is_observed
from .adapters import Adapters
from .bias_gradients import run_apart
from .presence import require_present
from .sharing import share_within_replica
from .stand_in import run_with
from .wiring import Wiring, acting, wiring_of


def adapted_forward(layer: nn.Module, wiring: Wiring, /, *args: Any, **kwargs: Any) -> Any:
    """Run an adapted layer: change its input, run it with changed weights, change its output."""
    if wiring.root and not torch.compiler.is_compiling():
        return _run_counted(layer, wiring, args, kwargs)
    if wiring.handovers:
        return _run_with_handovers(layer, wiring, args, kwargs)
    return _run_acting(layer, wiring, args, kwargs)


def _run_counted(layer: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the whole model, counted as running.

    A switch of all its layers waits until no other thread runs it; a forward that begins meanwhile waits for
    the switch.

    Raises:
        MedpeftError: a layer was replaced since `apply`, and its adapters are gone.
    """
    if "_is_replica" in layer.__dict__:  # torch sets this on a replica of `nn.DataParallel`.
        share_within_replica(layer)
    token = running.Token()
    try:
        # A switch that this forward waited for may have wired the model anew. Inside another forward of the
        # model, or inside a switch, the wiring stays that of this call.
        if running.begin(layer, token):
            wiring = wiring_of(layer) or wiring
        require_present(layer, wiring.branches)
        if wiring.handovers:
            return _run_with_handovers(layer, wiring, args, kwargs)
        return _run_acting(layer, wiring, args, kwargs)
    finally:
        running.end(layer, token)


def _run_acting(layer: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer with those of its adapters that act."""
    adapters = acting(layer)
    if adapters is None or adapters.installation not in ("", wiring.installation):
        return _run_unadapted(layer, wiring, args, kwargs)
    return _run_adapted(layer, adapters, wiring, args, kwargs)


def _run_unadapted(layer: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer of whose own adapters none acts.

    It is wired as the model, to read adapted weights of layers below it, to keep off a fused kernel, or to
    train its bias apart from its weight.
    """
    if wiring.apart:  # A convolution of torch's own, which reads nothing and has no other forward.
        return run_apart(layer, args, kwargs)
    return _run(layer, wiring, {}, args, kwargs)


def _run_with_handovers(
    layer: nn.Module, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a layer inside which one place of an adapter, or one adapter, leaves a value for another."""
    if layer.training and getattr(layer, "gradient_checkpointing", False):
        # Where transformers checkpoints inside the class's forward, backward would recompute that alone: the
        # handover would be closed, and the adapter silently take its default. So the checkpoint goes around
        # the open handovers here, and the one inside is switched off.
        overrides = {**wiring.overrides, "gradient_checkpointing": False}
        inside = replace(wiring, overrides=overrides, direct=False)
        recomputed = functools.partial(_with_open_handovers, layer, inside, kwargs)
        checkpoint: Any = layer._gradient_checkpointing_func
        return checkpoint(recomputed, *args)
    return _with_open_handovers(layer, wiring, kwargs, *args)


def _with_open_handovers(layer: nn.Module, wiring: Wiring, kwargs: dict[str, Any], *args: Any) -> Any:
    """Run a layer while values can be handed over inside it."""
    for handover in wiring.handovers:
        handover.open()
    try:
        return _run_acting(layer, wiring, args, kwargs)
    finally:
        for handover in wiring.handovers:
            handover.close()


def _run_adapted(
    layer: nn.Module, adapters: Adapters, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Pass an input through the input adapters, the layer, and the output adapters."""
    order = adapters.order
    if order.entering and (args or kwargs):
        args, kwargs = _change_inputs(adapters, wiring, args, kwargs)
    x: Any = None  # The layer's first input, as the input adapters have left it.
    if args:
        x = args[0]
    elif kwargs:
        x = kwargs[_first_name(kwargs, wiring)]
    leaving = order.leaving
    output: Any = None
    if order.joining and wiring.direct and len(args) == 1 and not kwargs:
        output = _run_joined(layer, adapters, adapters._modules[order.joining], x)
    if output is not None:
        leaving = order.leaving_later
    elif not order.on_weight and wiring.direct:
        output = type(layer).forward(layer, *args, **kwargs)
    elif not order.on_weight:
        output = _run(layer, wiring, {}, args, kwargs)
    elif order.dropping and adapters._modules[order.dropping].training:
        output = _run_dropping(layer, adapters, wiring, args, kwargs)
    elif not order.flexible or not isinstance(x, Tensor):
        tensors = adapted_tensors(layer, adapters, x)
        output = _run(layer, wiring, tensors, args, kwargs)
    else:
        output = _run_flexibly(layer, adapters, wiring, args, kwargs, x)
    if not leaving:
        return output
    y = output[0] if isinstance(output, tuple) else output
    for name in leaving:
        y = _change_output(adapters, adapters._modules[name], x, y)
    if isinstance(output, tuple):
        return (y, *output[1:])
    return y


def _run_joined(layer: nn.Module, adapters: Adapters, adapter: Any, x: Any) -> Tensor | None:
    """Run a layer and the adapter that acts on it first in one step; None where they are to be two."""
    if adapters.strength != 1 or is_observed(adapter) or not isinstance(x, Tensor):
        return None
    joined: Tensor | None = adapter.with_layer(layer, x)
    return joined


def _change_inputs(
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
    for name in adapters.order.entering:
        adapter: Adapter = adapters._modules[name]  # type: ignore[assignment]  # these names are of adapters
        x = adapters.part_of(x, adapter.enter(x, others))
    if args:
        args = (x, *[others.pop(name) for name in names])
        return args, others
    return (), {first: x, **others}


def _change_output(adapters: Adapters, adapter: Any, x: Any, y: Tensor) -> Any:
    """Let an adapter change the layer's output, into which it may write."""
    if adapters.strength == 1:
        return adapter(x, y)
    return adapters.part_of(y, adapter(x, y.clone()))


def _names_of(args: tuple[Any, ...], wiring: Wiring) -> list[str]:
    """Names of all positional inputs but the first; numbers for inputs without a name."""
    names = list(wiring.input_names[1 : len(args)])
    names += [str(number) for number in range(len(names) + 1, len(args))]
    return names


def _first_name(kwargs: dict[str, Any], wiring: Wiring) -> str:
    """Name of the layer's first input, if all come by keyword, in any order."""
    for name in wiring.input_names:
        if name in kwargs:
            return name
    return next(iter(kwargs))


def _run_dropping(
    layer: nn.Module, adapters: Adapters, wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a layer with an adapter whose change of the weight acts on an input of which some is dropped.

    It is W·x + b + (W' − W)·dropout(x), where W' has that change and W, b have those of all other adapters.
    """
    dropping: Any = adapters._modules[adapters.order.dropping]
    without = adapted_tensors(layer, adapters, without=dropping)
    output = _run(layer, wiring, without, args, kwargs)
    change = adapted_tensors(layer, adapters)
    for name in (dropping._weight, dropping._bias):
        before = without.get(name, own_tensor(layer, name))
        if before is not None:
            change[name] = change.get(name, before) - before
    if args:
        args = (dropping.dropout(args[0]), *args[1:])
    else:
        first = _first_name(kwargs, wiring)
        kwargs = {**kwargs, first: dropping.dropout(kwargs[first])}
    return output + _run(layer, wiring, change, args, kwargs)


def _run_flexibly(
    layer: nn.Module,
    adapters: Adapters,
    wiring: Wiring,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    x: Tensor,
) -> Any:
    """Run a layer that has a flexible adapter, in the form that the adapter chooses for this input."""
    order = adapters.order
    flexible: Any = adapters._modules[order.flexible]
    form = flexible.form(x, own_tensor(layer, flexible._weight))
    # An adapter that follows it on the weight, such as DoRA, must see the weight that it has changed.
    if form == "output" and order.on_weight[-1] == order.flexible:
        tensors = adapted_tensors(layer, adapters, x, without=flexible)
        output = _run(layer, wiring, tensors, args, kwargs)
        return _change_output(adapters, flexible, x, output)
    # `compute` takes the place of the layer, which it cannot where another adapter changes the weight.
    if form == "compute" and len(order.on_weight) == 1 and adapters.strength == 1:
        return flexible.compute(x, own_tensor(layer, flexible._bias))
    return _run(layer, wiring, adapted_tensors(layer, adapters, x), args, kwargs)


def _run(
    layer: nn.Module,
    wiring: Wiring,
    tensors: Mapping[str, Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run the layer's plain forward on changed tensors: its own, and those of layers below that it reads."""
    changes: dict[str, Mapping[str, Any]] = {}
    # With nothing switched on, the layer may take torch's fused kernel again, as the base does.
    overrides = wiring.overrides if wiring.overrides and _any_acts_in(layer) else {}
    if tensors or overrides:
        changes[""] = {**tensors, **overrides}
    for path in wiring.reads:
        layer_below = layer.get_submodule(path)
        adapters = acting(layer_below)
        if adapters is not None and adapters.order.on_weight:
            changes[path] = adapted_tensors(layer_below, adapters)
    return run_with(layer, changes, wiring.previous, args, kwargs)


def _any_acts_in(layer: nn.Module) -> bool:
    """Whether any adapter acts in the layer or in a module inside it."""
    return any(acting(module) is not None for module in layer.modules())
