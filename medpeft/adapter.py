"""An adapter is a small module registered as a child of the layer it adapts; hooks bring it into the forward.

It acts in one of two equivalent ways. On the *output*: a forward hook passes the layer's input and output through
`Adapter.forward`. On the *weight*: a cover puts what `Adapter.merged` returns in the place of the layer's parameters for the
duration of one forward, of the layer or of whichever module reads its weight without calling it. The layer keeps its class,
its parameters and every key of its `state_dict`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import MedpeftError
from .roles import Rows


@dataclass(frozen=True)
class Site:
    """Where an adapter goes.

    Attributes:
        name: Name of the layer in the model, as in `model.named_modules()`.
        layer: The layer.
        kind: What its weight is: "linear", "conv", "transposed", "norm", "embedding", or "block" for a whole block.
        weight: Name of the layer's weight; `in_proj_weight` in `nn.MultiheadAttention`.
        bias: Name of its bias, "" where it can have none.
        rows: Output channels to adapt in a fused projection; empty for all.
        parts: Letters of what the layer computes in an attention (q, k, v, o), "" elsewhere.
        reader: Name of the outermost module that reads the weight without calling the layer, None where there is none.
        overwritten: Whether a module of the model works in place, so that the layer's output may be written over.
        taps: Submodules of the layer; the input of the first of them to run is the adapter's x in place of the layer's own.
        generator: Source of the adapter's initial values.
        dry: Whether only shapes are wanted; `host` is then on the meta device.
    """

    name: str
    layer: nn.Module
    kind: str
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[Rows, ...] = ()
    parts: str = ""
    reader: str | None = None
    overwritten: bool = False
    taps: tuple[str, ...] = ()
    generator: torch.Generator | None = field(default=None, compare=False)
    dry: bool = False

    def tensor(self, name: str) -> Tensor | None:
        """The layer's own weight or bias, whatever covers it; None where it has none."""
        return own_tensor(self.layer, name)

    @property
    def host(self) -> Tensor:
        """The layer's weight, detached; a `MedpeftError` where it has none."""
        weight = self.tensor(self.weight)
        if weight is None:
            raise MedpeftError(f"{self.name} ({type(self.layer).__name__}) has no {self.weight} to adapt.")
        return weight.detach().to("meta") if self.dry else weight.detach()

    @property
    def key(self) -> str:
        """What follows the method's name in the adapter's own name, so that two weights of one layer keep apart."""
        return "" if self.weight in ("weight", "") else f"_{self.weight}"


class Adapter(nn.Module):
    """What a method does at one site: `forward` on the layer's output, `merged` on its weight, or both.

    A subclass takes `(site, *, option=default, ...)`, calls `super().__init__(site)` and creates its parameters so that the
    layer computes at first what it did before. With both `forward` and `merged`, the two must agree.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types that the method adapts, where `sites` is not overridden."""

    decays: ClassVar[bool] = True
    """Whether weight decay makes sense on its matrices; vectors and scalars are never decayed."""

    fast: ClassVar[tuple[str, ...]] = ()
    """Parameters that LoRA+ gives a higher learning rate."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight_name, self.bias_name = site.weight, site.bias
        self.on_output = type(self).forward is not Adapter.forward and site.reader is None
        self.method = ""
        self.switches = False
        self.taps = site.taps
        self.tapped: dict[int, Tensor] = {}

    @classmethod
    def sites(cls, network: Any, *, targeted: bool = False) -> Iterable[Site]:
        """The sites the method fits in a `medpeft.targets.Network`; options that choose sites come as keywords.

        Without a target, the paper's sites; with one (`targeted`), every layer that fits, of which the target then chooses.
        """
        return (site for site in network.sites() if isinstance(site.layer, cls.layers))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, from the layer's input `x` and its output `y`."""
        raise NotImplementedError(f"{type(self).__name__} acts on the weight alone.")

    def prefers_output(self, x: Tensor) -> bool:
        """Whether an adapter that `switches` acts on the output for this input of the layer, where that is the cheaper."""
        return False

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The adapted weight and bias; a `MedpeftError` with the reason where no weight computes the same."""
        raise MedpeftError(f"{type(self).__name__} computes what no weight of the layer can")


class Adapters(nn.ModuleDict):
    """The adapters of one layer, in the order in which they act: those on the weight before those on the output."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        ordered = sorted(adapters.items(), key=lambda item: item[1].on_output)
        super().__init__(dict(ordered))
        self.enabled = True

    def acting(self, on_output: bool, x: Any = None) -> list[Adapter]:
        """The adapters that act on the output, or those that act on the weight, for the layer's input `x` if given."""
        found = (m for m in self._modules.values() if isinstance(m, Adapter))
        return [
            a for a in found if (a.on_output or (a.switches and isinstance(x, Tensor) and a.prefers_output(x))) == on_output
        ]


def own_tensor(layer: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of that name, also while a cover hides it."""
    tensor = layer._parameters.get(name)
    return tensor if tensor is not None else layer._buffers.get(name)


def cast(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` in the adapter's dtype; unchanged under autocast, which casts by itself."""
    return x if _autocasts(x.device.type) else x.to(parameter.dtype)


def _autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; the meta device has none, and torch raises when asked."""
    return device != "meta" and torch.is_autocast_enabled(device)


def covering(layer: nn.Module, adapters: Iterable[Adapter]) -> dict[str, Tensor]:
    """What the adapters make of the layer's tensors, by name: the changed ones only.

    Raises:
        MedpeftError: an adapter cannot act on the weight; the message gives its reason.
    """
    values: dict[str, Tensor | None] = {}
    for adapter in adapters:
        names = adapter.weight_name, adapter.bias_name
        before = [values.get(name, own_tensor(layer, name)) for name in names]
        for name, old, new in zip(names, before, adapter.merged(*before), strict=True):
            values.update({name: new} if new is not old else {})
    return {name: value for name, value in values.items() if value is not None}


def attach(model: nn.Module, planned: Iterable[tuple[str, Site, Adapter]]) -> None:
    """Register each adapter at its site and hook it into the forward: `(method, site, adapter)` each."""
    by_layer: dict[str, list[tuple[str, Site, Adapter]]] = {}
    for item in planned:
        by_layer.setdefault(item[1].name, []).append(item)
    for name, items in by_layer.items():
        layer = items[0][1].layer
        layer.add_module("adapters", Adapters({method + site.key: adapter for method, site, adapter in items}))
        for reader in sorted({_reader(site) for _, site, adapter in items if not adapter.on_output}):
            cover = Cover(name[len(reader) :].lstrip("."))
            module = model.get_submodule(reader)
            module.register_forward_pre_hook(cover.put)
            module.register_forward_hook(cover.take, always_call=True)
        if any(adapter.on_output or adapter.switches for _, _, adapter in items):
            layer.register_forward_hook(_adapt_output, prepend=True, with_kwargs=True)
        for _, _, adapter in items:
            _tap(layer, adapter)


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
    return hook is _adapt_output or isinstance(getattr(hook, "__self__", None), (Cover, Tap))


def _unhook(module: nn.Module, key: int) -> None:
    for hooks in (
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
    ):
        hooks.pop(key, None)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """Every layer that has adapters: its name, itself, and they."""
    for name, layer in model.named_modules():
        adapters = layer._modules.get("adapters")
        if isinstance(adapters, Adapters):
            yield name, layer, adapters


def own_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers of all adapters, by their names in the model."""
    for name, _, adapters in adapted_layers(model):
        prefix = f"{name}.adapters.".lstrip(".")
        yield from ((prefix + key, tensor) for key, tensor in adapters.state_dict(keep_vars=True).items())


def _adapt_output(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    # Everything comes from `layer`, so that deepcopy, pickle and replicas adapt with their own adapters.
    adapters: Adapters = layer.adapters  # type: ignore[assignment]  # nn.Module types its children as Tensor | Module
    if not adapters.enabled:
        return output
    x = args[0] if args else next(iter(kwargs.values()), None)
    y = output[0] if isinstance(output, tuple) else output
    for adapter in adapters.acting(True, x):
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

    def put(self, module: nn.Module, args: Any) -> None:
        """Forward pre-hook: hide the layer's tensors behind the adapted ones."""
        layer = module.get_submodule(self.path) if self.path else module
        adapters: Adapters = layer.adapters  # type: ignore[assignment]  # as in _adapt_output
        if not adapters.enabled:
            return
        with _full_precision(layer):
            values = covering(layer, adapters.acting(False, args[0] if args and not self.path else None))
        # A norm without weights takes on the dtype of its input.
        given = args[0].dtype if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        dtype = next((p.dtype for p in layer.parameters(recurse=False)), given)
        with _switching():
            self.running[_thread()] = set(values)
            layer.__dict__.update({name: value.to(dtype) for name, value in values.items()})

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook, called after an error too: bring the layer's own tensors back."""
        layer = module.get_submodule(self.path) if self.path else module
        with _switching():
            names = self.running.pop(_thread(), set())
            # A forward in another thread may still read them; the last one out removes them.
            for name in () if self.running else names:
                layer.__dict__.pop(name, None)


_SWITCH = threading.Lock()


def _switching() -> Any:
    """One thread at a time puts tensors in place or takes them out; a compiled forward runs in one thread."""
    return nullcontext() if torch.compiler.is_compiling() else _SWITCH


def _full_precision(layer: nn.Module) -> Any:
    """Autocast off: a weight is adapted in its own precision, as merging does."""
    kind = next((p.device.type for p in layer.parameters()), "cpu")
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


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
