"""An adapter is a small module that changes what a layer computes. It is registered as a child of the layer.

It has three faces, three equivalent ways to express the same change:

- `enter(x, others)`: the input that the layer gets in place of its own,
- `forward(x, y)`: the output that the layer gives in place of its own,
- `merged(weight, bias)`: the weight and bias that the layer has in place of its own.

`forward.py` brings them into the layer's forward; merging is `merged` for good.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..architecture.site import Site
from ..errors import MedpeftError

Place = Literal["input", "output", "weight"]
ON_INPUT: frozenset[Place] = frozenset({"input"})
ON_OUTPUT: frozenset[Place] = frozenset({"output"})
ON_WEIGHT: frozenset[Place] = frozenset({"weight"})


class Adapter(nn.Module):
    """The change that a method makes at one site.

    `enter` changes the layer's input, `forward` its output, `merged` its weight. A subclass takes
    `(site, *, option=default, ...)`, calls `super().__init__(site)` and creates its parameters so that the
    layer computes at first what it did before. Where it has several faces, they must agree: the mechanism
    picks one.

    Attributes:
        method: Name of the method.
        acts_on: Where it acts: on the "input", the "output", both of them, or the "weight". By default on the
            input and the output where it has those faces, else on the weight; a subclass may narrow it down.
        shared: Modules that it uses and does not register, by attribute name. Modules shared by several
            adapters are registered once, on the model. A second place holds its first place here.

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
        # Names of the layer's tensors that it may change; "" for none.
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

        Without a target these are the paper's sites. With one (`targeted`) they are all layers that fit, and
        the target then chooses among them.
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
        """Compute the adapted weight and bias.

        Raises:
            MedpeftError: no weight computes the same; the message gives the reason.
        """
        raise MedpeftError(f"{type(self).__name__} computes what no weight of the layer can")


class FlexibleAdapter(Adapter):
    """An adapter that chooses for every forward the cheapest way to act. `acts_on` is then the weight.

    Its fourth face, `compute`, takes the place of the layer, which then need not run.
    """

    def form(self, x: Tensor, weight: Tensor | None) -> Literal["weight", "output", "compute"]:
        """Choose the face that acts on the input `x`, in a layer with this weight.

        Only "weight" is right where the layer's forward is not torch's own, or a parent reads its weight.
        """
        raise NotImplementedError

    def compute(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute the adapted output in place of the layer, from its input and its bias."""
        raise NotImplementedError


class JoiningAdapter(Adapter):
    """An adapter of the output or the weight that can compute a layer with its change in one step.

    That costs less. It is asked where it is the first to act on the layer.
    """

    def with_layer(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Compute the adapted output from the layer's input; None where layer and `forward` must do it.

        Args:
            layer: The adapter's own. Its tensors are as they are kept, and nobody has put another forward on
                it; what the forward of its class computes is for the adapter to ask.
            x: Its only input.
        """
        raise NotImplementedError


class DroppingAdapter(Adapter):
    """An adapter with a dropout of its input.

    Where it acts on the weight, the layer in training computes W·x + b + (W' − W)·dropout(x): its change acts
    on what is left of the input, and the weight itself on all of it.

    Attributes:
        drops: Whether `dropout` ever drops anything.
        dropout: Drops elements of the layer's input, in training alone.
    """

    drops: bool
    dropout: nn.Dropout


class SecondPlace(Adapter):
    """The second place of an adapter, at another layer. It has no parameters and holds the first place."""

    def __init__(self, site: Site, first: Adapter) -> None:
        super().__init__(site)
        self.shared["first"] = first

    @property
    def first(self) -> Adapter:
        """The first place. A subclass says by an annotation of which class it is."""
        return self.shared["first"]  # type: ignore[return-value]  # as it was made


def tensor_of(module: nn.Module, name: str) -> Any:
    """Return `module.name`, like `getattr`, but of a parameter in a quarter of the time.

    As there, an attribute of a stand-in comes before the parameter that it hides.
    """
    attributes = module.__dict__
    found = attributes.get(name)
    if found is None:
        found = attributes["_parameters"].get(name)
    if found is None:
        found = getattr(module, name)
    return found


def is_observed(adapter: Adapter) -> bool:
    """Whether somebody has put a hook or another forward on an adapter, and is to see it called."""
    # In a module's own dict, which is asked faster than the module.
    attributes = adapter.__dict__
    hooks = attributes["_forward_hooks"] or attributes["_forward_pre_hooks"]
    hooks = hooks or attributes["_backward_hooks"] or attributes["_backward_pre_hooks"]
    return bool(hooks or "forward" in attributes or _has_any_global_hook())


def weight_name(adapter: Adapter) -> str:
    """Name of the layer's weight at an adapter's site; "" for a whole block."""
    return adapter._weight


def parameters_of(adapter: Adapter) -> list[tuple[str, nn.Parameter]]:
    """List an adapter's parameters by name, with those of its shared modules."""
    parameters = list(adapter.named_parameters())
    if isinstance(adapter, SecondPlace):
        return parameters
    for attribute, module in adapter.shared.items():
        for name, parameter in module.named_parameters():
            parameters.append((f"{attribute}.{name}", parameter))
    return parameters


def state_of(adapter: Adapter) -> dict[str, Tensor]:
    """Map an adapter's parameters and persistent buffers by name, with those of its shared modules."""
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


def scale_columns(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    """Scale a weight, (M, N / G, …), by one value for each of its N channels, group by group."""
    by_group = weight.unflatten(0, (groups, -1))  # (M, N / G, …) → (G, M / G, N / G, …)
    columns = scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))  # (N,) → (G, 1, N / G, 1, …)
    scaled: Tensor = (by_group * columns).flatten(0, 1)  # (G, M / G, N / G, …) → (M, N / G, …)
    return scaled
