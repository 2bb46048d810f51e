"""The hooks that bring adapters into the forward: on a layer's input, its output, or in place of its tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from .adapter import Adapter, Adapters, autocasts, covering


def adapt_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an adapted layer: apply the adapters that act on its input."""
    adapters: Adapters = layer.adapters  # type: ignore[assignment]  # as in adapt_output
    if not adapters.enabled:
        return None
    for adapter in adapters.entering():
        first = "" if args else next(iter(kwargs))
        x = args[0] if args else kwargs[first]
        kwargs = {name: adapter.enter(x) if name == first else adapter.alongside(x, name, v) for name, v in kwargs.items()}
        args = (adapter.enter(x), *(adapter.alongside(x, "", value) for value in args[1:])) if args else ()
    return args, kwargs


def adapt_output(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of an adapted layer: apply the adapters that act on its output.

    Everything comes from `layer`, so that deepcopy, pickle and replicas adapt with their own adapters.
    """
    adapters: Adapters = layer.adapters  # type: ignore[assignment]  # nn.Module types its children as Tensor | Module
    if not adapters.enabled:
        return output
    x = args[0] if args else next(iter(kwargs.values()), None)
    y = output[0] if isinstance(output, tuple) else output
    for adapter, form in adapters.forms(layer, x):
        if form == "factors":
            y = adapter.finish(y, own_tensor(layer, adapter.bias_name))
        elif form == "output":
            y = adapter(adapter.tapped.pop(_thread(), x) if adapter.taps else x, y)
    return (y, *output[1:]) if isinstance(output, tuple) else y


def _thread() -> int:
    """Key of the running thread, so that two forwards of one model do not meet."""
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class Cover:
    """Puts the adapted tensors of the layer at `path` in place of its own for one forward of the module it is hooked to."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.running: dict[int, set[str]] = {}
        self.before: dict[str, Any] = {}

    def put(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: hide the layer's tensors behind the adapted ones."""
        layer = module.get_submodule(self.path) if self.path else module
        x = args[0] if args else next(iter(kwargs.values()), None)
        values = self.hides(layer, None if self.path else x)
        # A norm without weights takes on the dtype of its input.
        given = x.dtype if isinstance(x, Tensor) and x.is_floating_point() else None
        dtype = next((p.dtype for p in layer.parameters(recurse=False)), given)
        with _switching():
            if not self.running:
                # `bias_k` of an attention without one is an attribute, and None.
                self.before = {name: layer.__dict__[name] for name in values if name in layer.__dict__}
            self.running[_thread()] = set(values)
            layer.__dict__.update({name: value if value is None else value.to(dtype) for name, value in values.items()})

    def hides(self, layer: nn.Module, x: Any) -> Mapping[str, Tensor | None]:
        """What hides the layer's tensors while it computes, on `x` if that is known."""
        adapters: Adapters = layer.adapters  # type: ignore[assignment]  # as in adapt_output
        if not adapters.enabled:
            return {}
        forms = adapters.forms(layer, x)
        with _full_precision(layer):
            for adapter, form in forms:
                if form == "factors":
                    return {adapter.weight_name: adapter.factor(), adapter.bias_name: None}
            return covering(layer, [adapter for adapter, form in forms if form == "weight"])

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an error too: bring the layer's own tensors back."""
        layer = module.get_submodule(self.path) if self.path else module
        with _switching():
            names = self.running.pop(_thread(), set())
            # A forward in another thread may still read them; the last one out removes them.
            for name in () if self.running else names:
                layer.__dict__.pop(name, None)
                layer.__dict__.update({name: self.before[name]} if name in self.before else {})


_SWITCH = threading.Lock()


def _switching() -> Any:
    """One thread at a time puts tensors in place or takes them out; a compiled forward runs in one thread."""
    return nullcontext() if torch.compiler.is_compiling() else _SWITCH


def _full_precision(layer: nn.Module) -> Any:
    """Autocast off: a weight is adapted in its own precision, as merging does."""
    kind = next((p.device.type for p in layer.parameters()), "cpu")
    return torch.autocast(kind, enabled=False) if autocasts(kind) else nullcontext()


class Tap:
    """Keeps, for one forward of a block, the input of the first tapped submodule to run."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter

    def clear(self, block: nn.Module, args: Any) -> None:
        """Forward pre-hook of the block: forget what an interrupted forward may have left."""
        self.adapter.tapped.pop(_thread(), None)

    def store(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of a tapped submodule: keep its input if it is the first."""
        self.adapter.tapped.setdefault(_thread(), args[0] if args else next(iter(kwargs.values())))


class Elsewhere:
    """Applies an adapter to the output of a module other than its own layer."""

    def __init__(self, adapters: Adapters, adapter: Adapter, name: str) -> None:
        self.adapters, self.adapter, self.name = adapters, adapter, name

    def act(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the other module."""
        if not self.adapters.enabled:
            return None
        first, *rest = output if isinstance(output, tuple) else (output,)
        y = self.adapter.elsewhere(self.name, first)
        return (y, *rest) if isinstance(output, tuple) else y
