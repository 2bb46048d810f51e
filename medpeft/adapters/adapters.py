"""The adapters of one layer, and their order in a forward and in merging."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import as_kept, outputs_first, own_tensor
from .adapter import Adapter, DroppingAdapter, FlexibleAdapter, JoiningAdapter, SecondPlace


class Adapters(nn.ModuleDict):
    """The adapters of one layer, in the order in which they act.

    On the model itself it also holds the modules that adapters share.

    Attributes:
        enabled: Whether they act: False within `disabled` and `merged`.
        strength: Share of each one's change that acts: 1 but within `scaled`.
        entering: Names of the adapters that change the input, in order. One that also changes the output
            goes in first and comes out last, like brackets.
        on_weight: Names of the adapters that change the weight, in order.
        flexible: Name of the `FlexibleAdapter` in `on_weight`, "" for none.
        dropping: Name of the `DroppingAdapter` in `on_weight` that drops something, "" for none.
        leaving: Names of the adapters that change the output, in order.
        joining: Name of the first one of `leaving` if it is a `JoiningAdapter` and none is in `on_weight`, ""
            for none.
        installation: Key of the installation that they came with, "" if that is not known; see `Wiring`.
    """

    # Of the class too, for models that were pickled before.
    strength: float = 1.0
    installation: str = ""
    joining: str = ""

    def __init__(self, adapters: Mapping[str, Adapter]) -> None:
        # An input adapter computes W'·R·x. Merging gives the same only if additive changes of W come first:
        # (W + ΔW)·R. The second place of an adapter of another layer comes after the layer's own adapters.
        def order(name: str) -> tuple[bool, bool, bool]:
            adapter = adapters[name]
            second = isinstance(adapter, SecondPlace)
            return "output" in adapter.acts_on, second, type(adapter).enter is not Adapter.enter

        names = sorted(adapters, key=order)
        super().__init__({name: adapters[name] for name in names})
        self.enabled, self.strength = True, 1.0
        self.let_act(names)

    def let_act(self, names: Collection[str]) -> None:
        """Let those adapters act that have one of these names, in the order of all of them."""
        acting = {name: adapter for name, adapter in self.adapters() if name in names}
        self.on_weight = [name for name, adapter in acting.items() if "weight" in adapter.acts_on]
        self.flexible = next(
            (name for name in self.on_weight if isinstance(acting[name], FlexibleAdapter)), ""
        )
        self.dropping = ""
        for name in self.on_weight:
            adapter = acting[name]
            if isinstance(adapter, DroppingAdapter) and adapter.drops:
                self.dropping = name
        self.leaving = [name for name, adapter in acting.items() if "output" in adapter.acts_on]
        self.joining = ""
        if self.leaving and not self.on_weight and isinstance(acting[self.leaving[0]], JoiningAdapter):
            self.joining = self.leaving[0]
        inputs = [name for name, adapter in acting.items() if "input" in adapter.acts_on]
        brackets = [name for name in inputs if name in self.leaving]
        self.entering = [name for name in inputs if name not in brackets] + brackets[::-1]

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
        inputs = [name for name in self.entering if name not in self.leaving and name not in self.on_weight]
        by_name = dict(self.adapters())
        in_order = [by_name[name] for name in (*self.on_weight, *self.leaving, *reversed(inputs))]
        # A second place has no weight to change: the first place decides whether it can be merged.
        return [adapter for adapter in in_order if not isinstance(adapter, SecondPlace)]

    def part_of(self, before: Tensor | None, after: Tensor | None, name: str = "") -> Tensor | None:
        """Take part of a change: before + strength · (after − before).

        A layer without a weight computes as with one of ones, and one without a bias as with one of zeros.
        """
        if self.strength == 1 or after is None or after is before:
            return after
        if before is None:
            before = torch.zeros_like(after) if name.endswith("bias") else torch.ones_like(after)
        return before + self.strength * (after - before)

    def merged_tensors(self, layer: nn.Module, adapters: Iterable[Adapter]) -> dict[str, Tensor]:
        """Compute the tensors of the layer that `Adapter.merged` changes, by name.

        Raises:
            MedpeftError: an adapter cannot act on the weight; the message gives its reason.
        """
        changed: dict[str, Tensor] = {}
        for adapter in adapters:
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
