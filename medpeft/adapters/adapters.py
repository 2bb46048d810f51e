"""The adapters of one layer, and their order in a forward and in merging."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import as_kept, outputs_first, own_tensor
from .adapter import Adapter, DroppingAdapter, FlexibleAdapter, JoiningAdapter, SecondPlace


@dataclass(frozen=True, slots=True)
class Order:
    """Which of a layer's adapters act where, by their names, in the order in which they act.

    A forward asks all of it at every layer, so it is one small object.

    Attributes:
        entering: Those that change the input. First those that change nothing else; then those that change
            the output too, in reverse, like brackets: the last to come in is the first in `leaving`.
        on_weight: Those that change the weight.
        flexible: The `FlexibleAdapter` in `on_weight`, "" for none.
        dropping: The `DroppingAdapter` in `on_weight` that drops something, "" for none.
        leaving: Those that change the output.
        joining: The one that acts on the layer first, if it is a `JoiningAdapter`: the only one in
            `on_weight`, or where that is empty the first in `leaving`; "" for none.
        leaving_later: Those in `leaving` that act after it.
    """

    entering: tuple[str, ...]
    on_weight: tuple[str, ...]
    flexible: str
    dropping: str
    leaving: tuple[str, ...]
    joining: str
    leaving_later: tuple[str, ...]

    @classmethod
    def of(cls, acting: Mapping[str, Adapter]) -> Order:
        """Find the places of adapters, which come in their order in the layer."""
        on_weight = tuple(name for name, adapter in acting.items() if "weight" in adapter.acts_on)
        leaving = tuple(name for name, adapter in acting.items() if "output" in adapter.acts_on)
        flexible = dropping = joining = ""
        for name in on_weight:
            adapter = acting[name]
            if isinstance(adapter, FlexibleAdapter) and not flexible:  # One alone can choose its form.
                flexible = name
            if isinstance(adapter, DroppingAdapter) and adapter.drops:
                dropping = name
        if len(on_weight) == 1:
            first = on_weight[0]
        elif leaving and not on_weight:
            first = leaving[0]
        else:
            first = ""
        if first and isinstance(acting[first], JoiningAdapter):
            joining = first
        inputs = [name for name, adapter in acting.items() if "input" in adapter.acts_on]
        brackets = [name for name in inputs if name in leaving]
        leaving_later = tuple(name for name in leaving if name != joining)
        entering = (*[name for name in inputs if name not in brackets], *brackets[::-1])
        return cls(entering, on_weight, flexible, dropping, leaving, joining, leaving_later)


class Adapters(nn.ModuleDict):
    """The adapters of one layer, in the order in which they act.

    On the model itself it also holds the modules that adapters share.

    Attributes:
        enabled: Whether they act: False within `disabled` and `merged`.
        strength: Share of each one's change that acts: 1 but within `scaled`.
        order: Which of them act where.
        installation: Key of the installation that they came with, "" if that is not known; see `Wiring`.
    """

    # Of the class too, for models that were pickled before.
    strength: float = 1.0
    installation: str = ""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        # An input adapter computes W'·R·x. Merging gives the same only if additive changes of W come first:
        # (W + ΔW)·R. The second place of an adapter of another layer comes after the layer's own adapters.
        def turn(name: str) -> tuple[bool, bool, bool]:
            adapter = adapters[name]
            second = isinstance(adapter, SecondPlace)
            has_input_face = type(adapter).enter is not Adapter.enter
            return "output" in adapter.acts_on, second, has_input_face

        names = sorted(adapters, key=turn)
        super().__init__({name: adapters[name] for name in names})
        self.enabled, self.strength = True, 1.0
        self.let_act(names)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # of torch's
        if "order" not in state:  # Of a model that was pickled before.
            self.let_act([name for name, _ in self.adapters()])

    def let_act(self, names: Collection[str]) -> None:
        """Let those adapters act that have one of these names, in the order of all of them."""
        self.order = Order.of({name: adapter for name, adapter in self.adapters() if name in names})

    def forward(self, x: Any) -> Any:
        """Return `x`: an adapted `nn.Sequential` runs its adapters as if they were its last layer."""
        return x

    def adapters(self) -> Iterator[tuple[str, Adapter]]:
        """Yield every adapter by name, without the shared modules."""
        for name, module in self._modules.items():
            if isinstance(module, Adapter):
                yield name, module

    def in_merging_order(self) -> list[Adapter]:
        """List all adapters in merging order. Input adapters are merged last to first."""
        order = self.order
        inputs = [
            name for name in order.entering if name not in order.leaving and name not in order.on_weight
        ]
        by_name = dict(self.adapters())
        in_order = [by_name[name] for name in (*order.on_weight, *order.leaving, *reversed(inputs))]
        # A second place has no weight to change: the first place decides whether it can be merged.
        return [adapter for adapter in in_order if not isinstance(adapter, SecondPlace)]

    def part_of(self, before: Tensor | None, after: Tensor | None, name: str = "") -> Tensor | None:
        """Blend what was before a change with what is after it: before + strength · (after − before).

        Where there was nothing before, a layer without a weight computes as with one of ones, and one without
        a bias as with one of zeros; `name` tells which.
        """
        if self.strength == 1 or after is None or after is before:
            return after
        if before is None:
            before = torch.zeros_like(after) if name.endswith("bias") else torch.ones_like(after)
        return before + self.strength * (after - before)

    def merged_tensors(self, layer: nn.Module, in_order: Iterable[Adapter]) -> dict[str, Tensor]:
        """Compute the tensors of the layer that `Adapter.merged` changes, by name.

        Raises:
            MedpeftError: an adapter cannot act on the weight; the message gives its reason.
        """
        changed: dict[str, Tensor] = {}
        for adapter in in_order:
            weight = changed.get(adapter._weight, own_tensor(layer, adapter._weight))
            if weight is not None:
                weight = outputs_first(layer, weight)
            bias = changed.get(adapter._bias, own_tensor(layer, adapter._bias))
            new_weight, new_bias = adapter.merged(weight, bias)
            new_weight = self.part_of(weight, new_weight, adapter._weight)
            new_bias = self.part_of(bias, new_bias, adapter._bias)
            if new_weight is not None and new_weight is not weight:
                changed[adapter._weight] = as_kept(layer, new_weight)
            if new_bias is not None and new_bias is not bias:
                changed[adapter._bias] = new_bias
        return changed
