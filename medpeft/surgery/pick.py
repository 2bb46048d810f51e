"""Pick the sites and parameters of a method: all that it fits, narrowed by the target and the exclusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..adapters.by_place import Asked, ByPlace, at, choices
from ..adapters.registry import Method
from ..adapters.requests import Request
from ..architecture.layers import is_differentiable, is_norm_of_buffers, made_by
from ..architecture.network import Network
from ..architecture.quantised import is_quantised
from ..architecture.site import Site, Unfit
from ..architecture.targets import Target, choose, patterns
from ..errors import MedpeftError


class Picked(NamedTuple):
    """Sites of a method's adapters, names of the existing parameters that it trains, and its options."""

    sites: list[Site]
    parameters: list[str]
    options: dict[str, Any]


def pick(network: Network, request: Request, target: Target, exclude: Target) -> Picked:
    """Pick the sites and parameters of a method by the target and the exclusion.

    Raises:
        MedpeftError: nothing is left, or a pattern of an option by place decides nowhere.
    """
    method = request.method
    target = request.places.get("target", target)
    exclude = request.places.get("exclude", exclude)
    defaults = {}
    for option in method.by_place(request.options):
        if not isinstance(request.options[option], ByPlace):  # Else the values are by name already.
            defaults[option] = method.options[option]
    asked = Asked(network, method.name, request.options, defaults)
    offers: list[Site | Unfit] = []
    if method.adapter is not None:
        offers = offers_of(network, method, asked.everywhere, targeted=bool(patterns(target)))
    owner_of = dict(_selected(network, method, asked.everywhere))
    places = list(dict.fromkeys([*(offer.name for offer in offers), *owner_of.values()]))
    if places or patterns(target):
        chosen = choose(network, places, target, exclude, method.name)
        offers = [offer for offer in offers if offer.name in chosen]
        owner_of = {name: owner for name, owner in owner_of.items() if owner in chosen}
    offers = [offer for offer in offers if network.in_depth(offer.name)]
    owner_of = {name: owner for name, owner in owner_of.items() if network.in_depth(owner)}
    sites = [offer for offer in offers if isinstance(offer, Site)]
    unfit = next((offer for offer in offers if isinstance(offer, Unfit)), None)
    _require_plain(network, method, owner_of)
    picked = sites if method.adapter is not None else owner_of
    if not picked and method.name != "linear_probe":
        raise MedpeftError(_fits_nothing(network, method, target, unfit))
    adapted = [site.name for site in sites] if method.adapter is not None else owner_of.values()
    return Picked(sites, list(owner_of), asked.narrowed(adapted))


def offers_of(
    network: Network, method: Method, options: Mapping[str, Any], *, targeted: bool
) -> list[Site | Unfit]:
    """List what an additive method fits, every place by its own options, in the order of the model."""
    assert method.adapter is not None
    site_options = method.options_of_sites(options)
    different = choices(site_options)
    if len(different) == 1:
        return list(method.adapter.sites(network, targeted=targeted, **different[0]))
    offers: list[Site | Unfit] = []
    for choice in different:
        for_all = method.adapter.sites(network, targeted=targeted, **choice)
        offers += [offer for offer in for_all if at(site_options, offer.name) == choice]
    order = {name: number for number, name in enumerate(network.modules)}
    return sorted(offers, key=lambda offer: order[offer.name])


def _require_plain(network: Network, method: Method, owner_of: dict[str, str]) -> None:
    """Raise if a method would train numbers that were quantised, which have no gradients."""
    for name, owner in owner_of.items():
        if is_quantised(network.modules[owner], name.rpartition(".")[2]):
            raise MedpeftError(
                f"{method.name!r} would train {name}, which is quantised and has no gradient: exclude it, "
                "use a method beside the weights, such as 'lora' or 'bias', or apply before the model is "
                "quantised."
            )


def _selected(network: Network, method: Method, options: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the names of the existing parameters that a method trains, each with its layer.

    The original of a pruned or parametrised tensor is shown to the method as that tensor.
    """
    predicate: Any = method.define
    options = method.options_of_adapter(options)
    if method.adapter is not None:
        if method.selects is None:
            return
        predicate, options = method.selects, {}
    for name, parameter in network.model.named_parameters():
        stands_for = made_by(name)
        owner = stands_for.rpartition(".")[0]
        if not is_differentiable(parameter) and not is_quantised(network.modules[owner]):
            continue
        if network.in_head(owner):
            continue
        if predicate(stands_for, parameter, network.layer(owner), **at(options, owner)):
            yield name, owner


def _fits_nothing(network: Network, method: Method, target: Target, unfit: Unfit | None) -> str:
    """Write the message for a method that fits no layer of a model."""
    counts: dict[str, int] = {}
    for module in network.modules.values():
        if any(True for _ in module.parameters(recurse=False)):
            type_name = type(module).__name__
            counts[type_name] = counts.get(type_name, 0) + 1
    most = sorted(counts, key=lambda name: -counts[name])[:6]
    where = f"target={target!r}"
    if network.depth < 1:
        where += f", depth={network.depth:g}"
    reason = f"{unfit.name} {unfit.reason}; " if unfit is not None else ""
    hint = method.hint or "see its docstring for the layers that it adapts."
    return (
        f"{method.name!r} found nothing to train in {type(network.model).__name__} ({where}): "
        f"{reason}{hint} This model has {', '.join(most) or 'no parameters'}."
        f"{_norms_of_buffers(network, method)}"
    )


def _norms_of_buffers(network: Network, method: Method) -> str:
    """Say that the model has norms whose weight and bias a selective method cannot train."""
    if method.adapter is not None:
        return ""
    for name, module in network.modules.items():
        if is_norm_of_buffers(module):
            return (
                f" {name} ({type(module).__name__}) keeps its weight and bias as buffers, which never train: "
                "build the model with BatchNorm, whose statistics medpeft freezes."
            )
    return ""
