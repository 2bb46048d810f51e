"""Build the adapters of a plan, or only their shapes, without changing the model."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import ON_WEIGHT, Adapter, parameters_of
from ..adapters.by_place import ByPlace, at
from ..adapters.handover import Handover
from ..adapters.record import Applied, applied, named_state
from ..adapters.registry import Method, methods
from ..adapters.sharing import home_of
from ..adapters.stand_in import rebound
from ..architecture.quantised import is_quantised
from ..architecture.site import Site
from ..errors import MedpeftError, listed, require
from .install import Built
from .refusals import refuse_layer, refuse_occupied


class Planned(NamedTuple):
    """A method, and the site of one of its adapters."""

    method: Method
    site: Site


def in_order(sites: list[Planned]) -> list[Planned]:
    """Sort sites by the order of `methods()`, in which adapters act however a union is written."""
    order = list(methods())
    return sorted(sites, key=lambda planned: order.index(planned.method.name))


def build(
    model: nn.Module,
    sites: list[Planned],
    record: Applied,
    *,
    shapes_only: bool = False,
    from_file: bool = False,
) -> list[Built]:
    """Build an adapter for every site, on its layer's device, or with `shapes_only` on the meta device.

    With `from_file` their values are not looked for: those of a file will take their place.

    Raises:
        MedpeftError: an option is wrong, or an adapter could not act at its site.
    """
    shared: dict[tuple[str, torch.device], dict[Any, nn.Module]] = {}
    together: dict[str, list[Site]] = {}
    handovers: dict[str, Handover] = {}
    for method, site in sites:
        together.setdefault(method.name, []).append(site)
        handovers.setdefault(method.name, Handover())
    built = []
    for method, site in tqdm(sites, desc=record.name, delay=1.0, leave=False, disable=shapes_only):
        name = method.name
        draft = replace(
            site.draft, together=tuple(together[name]), handover=handovers[name], from_file=from_file
        )
        planned = Planned(method, replace(site, draft=draft))
        built += _build_at(model, planned, record, shared, shapes_only=shapes_only)
    _require_agreement(built, record)
    if applied(model) is None:  # A plan may be printed once it is carried out.
        _require_places(model, built)
    return built


def _require_agreement(built: list[Built], record: Applied) -> None:
    """Raise if adapters that share a module, or hand values to one another, differ in an option by place."""
    firsts: dict[tuple[str, int], Built] = {}
    for item in built:
        options = item.method.options_of_adapter(record.methods[item.method.name])
        by_place = {option: value for option, value in options.items() if isinstance(value, ByPlace)}
        if item.first is not None or not by_place:
            continue
        common = [id(module) for module in item.adapter.shared.values() if not isinstance(module, Adapter)]
        if item.site.draft.around is not None:
            common.append(id(item.site.draft.handover))
        for module in common:
            first = firsts.setdefault((item.method.name, module), item)
            here, there = at(by_place, item.site.name), at(by_place, first.site.name)
            differing = [option for option in by_place if here[option] != there[option]]
            require(
                not differing,
                f"{item.method.name!r} at {item.site.name} and at {first.site.name} work with the same "
                f"numbers, so {listed(differing)} cannot differ there: give one value to all layers.",
            )


def _require_places(model: nn.Module, built: list[Built]) -> None:
    """Raise if something is called `adapters` already where adapters or shared modules are to be."""
    for item in built:
        refuse_occupied(item.site.layer, item.site.name)
        if item.first is None and item.adapter.shared:
            refuse_occupied(home_of(model, item.site.layer), "")


def _build_at(
    model: nn.Module,
    planned: Planned,
    record: Applied,
    shared: dict[tuple[str, torch.device], dict[Any, nn.Module]],
    *,
    shapes_only: bool,
) -> list[Built]:
    """Build the adapter of one site and the adapters of its partners."""
    method, site = planned
    refuse_layer(method, site)
    device, dtype = _place(site, model)
    if shapes_only or device.type == "meta":
        device, built_on = torch.device("meta"), "meta"
    else:
        built_on = "cpu"
    seed = zlib.crc32(f"{record.seed}:{method.name}:{site.name}:{site.weight}".encode())
    draft = replace(
        site.draft,
        method=method.name,
        generator=torch.Generator().manual_seed(seed),
        shapes_only=built_on == "meta",
        shared=shared.setdefault((method.name, device), {}),
    )
    with torch.device(built_on):
        adapter = _adapter_of(method, replace(site, draft=draft), record)
    _require_acting(method, site, adapter)
    built = [Built(method, site, adapter)]
    for partner in site.partners:
        second = partner.make(replace(partner.site, draft=draft), adapter)
        assert isinstance(second, Adapter)
        built.append(Built(method, partner.site, second, first=adapter))
    for item in built:
        item.adapter.to(device=device, dtype=record.dtype or dtype)
        item.adapter.train(item.site.layer.training)
        for module in item.adapter.shared.values():
            module.to(device=device, dtype=record.dtype or dtype)
    return built


def _adapter_of(method: Method, site: Site, record: Applied) -> Adapter:
    """Make the adapter of a site.

    Raises:
        MedpeftError: it would change or take apart a quantised weight.
    """
    quantised = is_quantised(site.layer, site.weight)
    refusal = MedpeftError(
        f"{method.name!r} changes or takes apart the weight of {site.name}, which is quantised: exclude it, "
        "use a method that acts on the layer's output, such as 'lora' or 'ssf', without options that need "
        "the weight (dora, init), or apply to the model before it is quantised."
    )
    try:
        options = method.options_of_adapter(record.methods[method.name])
        adapter = method.define(site, **at(options, site.name))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        if quantised:
            raise refusal from error
        raise
    assert isinstance(adapter, Adapter)
    made = chain(adapter.parameters(), adapter.buffers())
    needs_values = not site.draft.shapes_only and any(tensor.is_meta for tensor in made)
    if quantised and ("weight" in adapter.acts_on or needs_values):
        raise refusal
    return adapter


def _require_acting(method: Method, site: Site, adapter: Adapter) -> None:
    """Raise if no face of an adapter can act at its site."""
    can_merge = type(adapter).merged is not Adapter.merged
    if adapter.acts_on == ON_WEIGHT and not can_merge:
        reader = site.readers[0].name if site.readers else ""
        raise MedpeftError(
            f"{method.name!r} acts on the output of {site.name}, but {reader or 'its parent'} reads the "
            "layer's weight without calling it, so the output never is: exclude it, or use a method that "
            "acts on weights, such as 'lora'."
        )
    replaced = site.layer.__dict__.get("forward")
    acts_on_weight = "weight" in adapter.acts_on
    if acts_on_weight and callable(replaced) and rebound(replaced, site.layer, site.layer) is None:
        raise MedpeftError(
            f"The forward of {site.name} was replaced by a function of its own, and {method.name!r} changes "
            "the layer's weight, which that function may hold: exclude the layer, or apply first and replace "
            "its forward then."
        )


def _place(site: Site, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Choose an adapter's device, its layer's, and its dtype: float32, or the layer's if that is wider."""
    weight = site.tensor(site.weight) if site.weight else None
    # A norm without weights computes on the device of the rest of the model.
    for tensor in chain((weight,), site.layer.parameters(), model.parameters()):
        if tensor is not None and tensor.is_floating_point():
            return tensor.device, torch.promote_types(tensor.dtype, torch.float32)
    return torch.device("cpu"), torch.float32


def count_new(adapter: Adapter, counted: set[nn.Parameter]) -> int:
    """Count an adapter's trainable parameters, those in `counted` left out, and add them to it."""
    total = 0
    for _, parameter in parameters_of(adapter):
        if parameter.requires_grad and parameter not in counted:
            counted.add(parameter)
            total += parameter.numel()
    return total


def state_of_built(built: Iterable[Built]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of adapters that are not in the model yet, as `own_state` will once they are."""
    return named_state((item.site.name, item.name, item.adapter) for item in built)
