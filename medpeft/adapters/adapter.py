"""An adapter is a small module, registered as a child of the layer it adapts, that changes what the layer computes.

It has three faces, which are three equivalent ways to say what it does:

- `enter(x, others)`: the input that the layer gets in place of its own,
- `forward(x, y)`: the output that the layer gives in place of its own,
- `merged(weight, bias)`: the weight and bias that the layer has in place of its own.

`forward.py` brings them into the layer's forward; merging is `merged` for good.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from ..architecture.site import Site
from ..errors import MedpeftError

Place = Literal["input", "output", "weight"]
ON_INPUT: frozenset[Place] = frozenset({"input"})
ON_OUTPUT: frozenset[Place] = frozenset({"output"})
ON_WEIGHT: frozenset[Place] = frozenset({"weight"})


class Adapter(nn.Module):
    """What a method does at one site: `enter` on the input, `forward` on the output, `merged` on the weight of the layer.

    A subclass takes `(site, *, option=default, ...)`, calls `super().__init__(site)` and creates its
    parameters so that the layer computes at first what it did before. Where it has several faces, they must
    agree: the mechanism picks one.

    Attributes:
        method: Name of the method.
        acts_on: Where it acts: on the "input", the "output", both of them, or the "weight". By default on the
            input and the output where it has those faces, else on the weight; a subclass may narrow it down.
        shared: Modules that it works with and does not register, by attribute name: those that several
            adapters share, which are registered once, on the model; and of an adapter's second place the
            first.

    Examples:
        >>> import medpeft, torch
        >>> @medpeft.register("gain_of_the_output")
        ... class Gain(medpeft.Adapter):
        ...     layers = (torch.nn.Linear,)
        ...     def __init__(self, site):
        ...         super().__init__(site)
        ...         self.gain = torch.nn.Parameter(torch.ones(site.host.shape[0]))
        ...     def forward(self, x, y):
        ...         return y * self.gain
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(medpeft.plan(model, "gain_of_the_output", head="2").trainable)  # 8 gains, and the head's 18
        26
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types that the method adapts, where `sites` is not overridden."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.method = site.draft.method
        self.acts_on = self._places(only_weight=site.only_weight)
        self.shared: dict[str, nn.Module] = {}
        self._weight, self._bias = site.weight, site.bias

    @classmethod
    def _places(cls, *, only_weight: bool) -> frozenset[Place]:
        places: set[Place] = set()
        if cls.enter is not Adapter.enter and not only_weight:
            places.add("input")
        if cls.forward is not Adapter.forward and not only_weight:
            places.add("output")
        return frozenset(places) or ON_WEIGHT

    @classmethod
    def sites(cls, network: Any, *, targeted: bool = False) -> Iterable[Any]:
        """Yield the sites that the method fits in a `Network`; options that choose sites come as keywords.

        Without a target, the paper's sites; with one (`targeted`), every layer that fits, of which the target
        then chooses.
        """
        for site in network.sites():
            if isinstance(site.layer, cls.layers):
                yield site

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Compute the input that the layer gets in place of its own input `x`.

        `others` holds the layer's further inputs, a mask for instance, by name. It may be changed in place.
        """
        raise NotImplementedError(f"{type(self).__name__} leaves the input alone.")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the adapted output, from the layer's input `x` and its output `y`."""
        raise NotImplementedError(f"{type(self).__name__} acts on the weight alone.")

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute the adapted weight and bias; a `MedpeftError` with the reason where no weight computes the same."""
        raise MedpeftError(f"{type(self).__name__} computes what no weight of the layer can")


class FlexibleAdapter(Adapter):
    """An adapter that chooses for every forward how to act, in the cheapest way; `acts_on` is then the weight.

    It has a fourth face, `compute`, for where the layer itself need not run.
    """

    def form(self, x: Tensor, weight: Tensor | None) -> Literal["weight", "output", "compute"]:
        """Choose by which face to act on the input `x` of a layer of that weight."""
        raise NotImplementedError

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the adapted output in place of the layer, from its input and its bias."""
        raise NotImplementedError


class SecondPlace(Adapter):
    """The second place of an adapter: an adapter without parameters at another layer, which holds the first."""

    def __init__(self, site: Site, first: Adapter) -> None:
        super().__init__(site)
        self.shared["first"] = first


class Handover:
    """What one place of an adapter leaves for the other, within one forward of the layer, apart for each thread.

    Calls of a layer within a call of itself stack up. Copies and files start empty.
    """

    def __init__(self) -> None:
        self._frames: dict[int, list[list[Any]]] = {}

    def open(self) -> None:
        """Begin a forward of the layer."""
        self._frames.setdefault(_thread(), []).append([])

    def close(self) -> None:
        """End the forward, and forget what was left in it."""
        frames = self._frames.get(_thread())
        if frames:
            frames.pop()
        if not frames:
            self._frames.pop(_thread(), None)

    def leave(self, value: Any) -> None:
        """Keep a value for the other place, unless one was left already, or no forward of the layer is running."""
        frames = self._frames.get(_thread())
        if frames and not frames[-1]:
            frames[-1].append(value)

    def take(self, default: Any) -> Any:
        """Return what was left, or the default."""
        frames = self._frames.get(_thread())
        if frames and frames[-1]:
            return frames[-1][0]
        return default

    def __reduce__(self) -> tuple[type[Handover], tuple[()]]:
        return Handover, ()


def _thread() -> int:
    """Key of the running thread; a compiled forward runs in one."""
    if torch.compiler.is_compiling():
        return 0
    return threading.get_ident()


class Adapters(nn.ModuleDict):
    """The adapters of one layer, in the order in which they act; on the model itself also the modules that they share.

    Attributes:
        enabled: Whether they act: False within `disabled` and `merged`.
        entering: Names of those that change the input, in order. One that also changes the output goes in
            first and comes out last, like brackets.
        on_weight: Names of those that change the weight, in order.
        flexible: Name of the one among them that chooses how to act, "" for none.
        leaving: Names of those that change the output, in order.
        handovers: Names of those with another place, which leaves something for them.
    """

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        # An input adapter computes W'·R·x. Merging gives the same only if additive changes of W come first:
        # (W + ΔW)·R. The second place of an adapter of another layer comes after the layer's own adapters.
        def order(name: str) -> tuple[bool, bool, bool]:
            adapter = adapters[name]
            second = isinstance(adapter, SecondPlace)
            return "output" in adapter.acts_on, second, type(adapter).enter is not Adapter.enter

        names = sorted(adapters, key=order)
        super().__init__({name: adapters[name] for name in names})
        self.enabled = True
        self.on_weight = [name for name in names if "weight" in adapters[name].acts_on]
        self.flexible = next(
            (name for name in self.on_weight if isinstance(adapters[name], FlexibleAdapter)), ""
        )
        self.leaving = [name for name in names if "output" in adapters[name].acts_on]
        inputs = [name for name in names if "input" in adapters[name].acts_on]
        brackets = [name for name in inputs if name in self.leaving]
        self.entering = [name for name in inputs if name not in brackets] + brackets[::-1]
        self.handovers = [name for name in names if hasattr(adapters[name], "handover")]

    def forward(self, x: Any) -> Any:
        """Return `x`: an `nn.Sequential` that is adapted runs its adapters as if they were its last layer."""
        return x

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Yield every adapter by name; not the shared modules."""
        for name, module in self._modules.items():
            if isinstance(module, Adapter):
                yield name, module

    def in_merging_order(self) -> list[Adapter]:
        """All adapters in merging order. Input adapters are merged last to first."""
        inputs = [name for name in self.entering if name not in self.leaving and name not in self.on_weight]
        by_name = dict(self.adapters())
        in_order = [by_name[name] for name in (*self.on_weight, *self.leaving, *reversed(inputs))]
        # The second place of an adapter has no weight to change: the first says whether it can be merged.
        return [adapter for adapter in in_order if not isinstance(adapter, SecondPlace)]

    def adapted_tensors(self, layer: nn.Module, adapters: Iterable[Adapter]) -> dict[str, Tensor]:
        """Compute what adapters make of the layer's tensors, by name: the changed ones only.

        Raises:
            MedpeftError: an adapter cannot act on the weight; the message gives its reason.
        """
        changed: dict[str, Tensor] = {}
        for adapter in adapters:
            weight = changed.get(adapter._weight, own_tensor(layer, adapter._weight))
            bias = changed.get(adapter._bias, own_tensor(layer, adapter._bias))
            new_weight, new_bias = adapter.merged(weight, bias)
            if new_weight is not None and new_weight is not weight:
                changed[adapter._weight] = new_weight
            if new_bias is not None and new_bias is not bias:
                changed[adapter._bias] = new_bias
        return changed


def weight_name(adapter: Adapter) -> str:
    """Name of the layer's weight that an adapter goes with; "" for a whole block."""
    return adapter._weight


def parameters_of(adapter: Adapter) -> list[tuple[str, nn.Parameter]]:
    """List an adapter's parameters by name, those of the modules that it shares included."""
    parameters = list(adapter.named_parameters())
    if isinstance(adapter, SecondPlace):
        return parameters
    for attribute, module in adapter.shared.items():
        for name, parameter in module.named_parameters():
            parameters.append((f"{attribute}.{name}", parameter))
    return parameters


def state_of(adapter: Adapter) -> dict[str, Tensor]:
    """Map an adapter's parameters and persistent buffers by name, those of the modules that it shares included."""
    state: dict[str, Tensor] = adapter.state_dict(keep_vars=True)
    if isinstance(adapter, SecondPlace):
        return state
    for attribute, module in adapter.shared.items():
        module.state_dict(destination=state, prefix=f"{attribute}.", keep_vars=True)
    return state


def cast(x: Tensor, parameter: Tensor) -> Tensor:
    """Cast `x` to the adapter's dtype; under autocast, which casts by itself, return it unchanged."""
    if autocasts(x.device.type):
        return x
    return x.to(parameter.dtype)


def autocasts(device: str) -> bool:
    """Whether autocast is on for a device type; the meta device has none, and torch raises when asked."""
    return device != "meta" and torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device)


def along(values: Tensor, y: Tensor, axis: int) -> Tensor:
    """View one value a channel, (C,), so that it broadcasts along an axis of `y`."""
    if axis == -1 or y.ndim == 1:
        return values  # (C,) broadcasts along the last axis as it is.
    shape = [1] * y.ndim
    shape[axis] = -1
    return values.view(shape)  # (C,) → (1, …, C, …, 1)
