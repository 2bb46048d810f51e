"""Runs a model on data before it is adapted, for methods that start from what enters its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..adapters.aside import Settled
from ..adapters.spread import Spread
from ..errors import clipped, require
from .build import Planned, build
from .outputs import outputs_of
from .plan import Plan


def with_inputs(planned: Plan, data: Iterable[Any] | None) -> Plan:
    """Note at the sites of a plan how what enters their layers spreads on the data, if there are any.

    The model is untouched.

    Raises:
        MedpeftError: no adapter starts from it, or the model does not run on the data.
    """
    if data is None:
        return planned
    require(
        isinstance(data, Iterable),
        f"data={clipped(data)} must be batches, each an input of the model or a tuple of inputs.",
    )
    spreads: dict[str, Spread] = {}
    for item in build(planned.model, planned.sites, planned.record, shapes_only=True):
        if getattr(item.adapter, "starts_from_inputs", False):
            spreads[item.site.name] = Spread(item.site.name)
    require(
        bool(spreads),
        f"data= is for adapters that start from what enters their layers, and none of "
        f"{planned.record.name!r} does: leave it out, or pass init='eva' to 'lora'.",
    )
    _observe(planned.model, spreads, data)
    sites = []
    for method, site in planned.sites:
        draft = replace(site.draft, entered=spreads.get(site.name))
        sites.append(Planned(method, replace(site, draft=draft)))
    return replace(planned, sites=sites)


def _observe(model: nn.Module, spreads: dict[str, Spread], data: Iterable[Any]) -> None:
    """Run the model on every batch in eval mode, and add to the spreads what enters their layers."""
    handles: list[RemovableHandle] = []

    def settle() -> None:
        for handle in handles:
            handle.remove()

    settled = Settled(settle)
    with settled, settled:
        for name, spread in spreads.items():
            layer = model.get_submodule(name)
            handles.append(layer.register_forward_pre_hook(_adding_to(spread), with_kwargs=True))
        for batch in data:
            outputs_of(model, batch)


def _adding_to(spread: Spread) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """Make a hook that adds the first input of a layer to a spread."""

    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = next(iter([*args, *kwargs.values()]), None)
        if isinstance(entered, Tensor):
            spread.add(entered)

    return add
