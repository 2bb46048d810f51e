"""An adapter is a small module registered as a child of the layer it adapts; hooks bring it into the forward.

It acts in one of three equivalent ways. On the *output*: a forward hook passes the layer's input and output through
`Adapter.forward`. On the *input*: a pre-hook passes it through `Adapter.enter`. On the *weight*: a cover puts what
`Adapter.merged` returns in the place of the layer's parameters for the duration of one forward, of the layer or of whichever
module reads its weight without calling it. Or half on each: the cover puts one factor of the weight there, and the hook
applies the other. The layer keeps its class, its parameters and every key of its `state_dict`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from ..architecture.site import Site
from ..errors import MedpeftError

Form = Literal["weight", "output", "input", "factors"]


class Adapter(nn.Module):
    """What a method does at one site: `forward` on the layer's output, `enter` on its input, `merged` on its weight.

    A subclass takes `(site, *, option=default, ...)`, calls `super().__init__(site)` and creates its parameters so that the
    layer computes at first what it did before. `merged` must agree with the others: the mechanism picks one or the other.
    """

    layers: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types that the method adapts, where `sites` is not overridden."""

    decays: ClassVar[bool] = True
    """Whether weight decay makes sense on its matrices; vectors and scalars are never decayed."""

    fast: ClassVar[tuple[str, ...]] = ()
    """Parameters that LoRA+ gives a higher learning rate."""

    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values worth trying, per option: what `medpeft.search_space` gives to a search for hyper-parameters."""

    identity: ClassVar[bool] = True
    """Whether the adapted model computes at first what the base does."""

    unmergeable: ClassVar[str] = ""
    """Why no weight of the layer computes what the method does, where none ever can: what `merge` says."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.weight_name, self.bias_name = site.weight, site.bias
        self.on_output = type(self).forward is not Adapter.forward and site.reader is None
        self.on_input = type(self).enter is not Adapter.enter and site.reader is None
        self.method = ""
        self.switches = False
        self.taps, self.others = site.taps, site.others
        self.added = 0  # Tokens that it puts into its layer's input,
        self.before = 0  # and those that other adapters put there before the patches.
        self.tapped: dict[int, Tensor] = {}

    @classmethod
    def sites(cls, network: Any, *, targeted: bool = False) -> Iterable[Site]:
        """The sites the method fits in a `medpeft.targets.Network`; options that choose sites come as keywords.

        Without a target, the paper's sites; with one (`targeted`), every layer that fits, of which the target then chooses.
        """
        return (site for site in network.sites() if isinstance(site.layer, cls.layers))

    @staticmethod
    def selects(name: str, parameter: nn.Parameter, layer: Any) -> bool:
        """Whether the method trains this existing parameter too, as a selective method would; `layer` as there."""
        return False

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The adapted output, from the layer's input `x` and its output `y`."""
        raise NotImplementedError(f"{type(self).__name__} acts on the weight alone.")

    def enter(self, x: Tensor) -> Tensor:
        """What the layer takes in the place of its own input `x`."""
        raise NotImplementedError(f"{type(self).__name__} leaves the input alone.")

    def alongside(self, x: Tensor, name: str, value: Any) -> Any:
        """What the layer takes in the place of another of its inputs, a mask for instance, for its own input `x`.

        `name` is that of a keyword, and "" by position.
        """
        return value

    def elsewhere(self, name: str, y: Tensor) -> Tensor:
        """What another module gives in the place of its output `y`; `name` is one of `Site.others`."""
        return y

    @property
    def usual_form(self) -> Form:
        """How the adapter acts where it does not switch; one that acts on the input may act on the output too."""
        return "output" if self.on_output else "input" if self.on_input else "weight"

    def form_for(self, x: Tensor, weight: Tensor | None) -> Form:
        """How an adapter that `switches` acts on a layer of this weight for the input `x`: in the cheapest way."""
        return self.usual_form

    def factor(self) -> Tensor:
        """The weight by which the layer, without its bias, computes the first half of the form "factors"."""
        raise NotImplementedError(f"{type(self).__name__} has no factors.")

    def finish(self, half: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted output, from what the layer computed by `factor()`, and from the layer's bias."""
        raise NotImplementedError(f"{type(self).__name__} has no factors.")

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The adapted weight and bias; a `MedpeftError` with the reason where no weight computes the same."""
        raise MedpeftError(self.unmergeable or f"{type(self).__name__} computes what no weight of the layer can")


class Adapters(nn.ModuleDict):
    """The adapters of one layer, in the order in which they act: those on the weight before those on the output."""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        # What multiplies the weight from the right meets all that is added to it, whether it acts on the input or the weight.
        enters = {name: type(adapter).enter is not Adapter.enter for name, adapter in adapters.items()}
        ordered = sorted(adapters.items(), key=lambda item: (item[1].on_output, enters[item[0]]))
        super().__init__(dict(ordered))
        self.enabled = True

    def forward(self, x: Any) -> Any:
        """`x` as it is: an `nn.Sequential` that is adapted runs its adapters as if they were its last layer."""
        return x

    def every(self) -> list[Adapter]:
        """All adapters in the order in which merging folds them in: of those on the input, the last to act comes first."""
        return [*self.acting(False), *self.acting(True), *(a for a in self.entering()[::-1] if not a.on_output)]

    def acting(self, on_output: bool) -> list[Adapter]:
        """The adapters that act on the output, or those that act on the weight, where the layer's input leaves the choice."""
        found = (m for m in self._modules.values() if isinstance(m, Adapter))
        return [a for a in found if (a.on_output if on_output else not (a.on_output or a.on_input))]

    def entering(self) -> list[Adapter]:
        """The adapters that act on the input, in the order in which they do: who undoes it last on the output comes first."""
        found = [m for m in self._modules.values() if isinstance(m, Adapter) and m.on_input]
        return [*(a for a in found if not a.on_output), *(a for a in found[::-1] if a.on_output)]

    def forms(self, layer: nn.Module, x: Any) -> list[tuple[Adapter, Form]]:
        """Each adapter with the form in which it acts when `layer` is given `x`."""
        every, tensor = self.every(), isinstance(x, Tensor)
        forms = [a.form_for(x, own_tensor(layer, a.weight_name)) if a.switches and tensor else a.usual_form for a in every]
        if "factors" in forms and sum(form in ("weight", "factors") for form in forms) > 1:
            # The layer cannot compute with a factor of a weight that another adapter changes.
            forms = ["weight" if form == "factors" else form for form in forms]
        return list(zip(every, forms, strict=True))


def cast(x: Tensor, parameter: Tensor) -> Tensor:
    """`x` in the adapter's dtype; unchanged under autocast, which casts by itself."""
    return x if autocasts(x.device.type) else x.to(parameter.dtype)


def autocasts(device: str) -> bool:
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
