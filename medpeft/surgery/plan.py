"""Plan what `apply` would do: the sites and parameters that a request picks, found before anything changes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..adapters.batchnorm import with_statistics
from ..adapters.record import Applied
from ..adapters.registry import Method, Methods, Request, find, resolve
from ..architecture.head import Head, find_head
from ..architecture.network import Network
from ..architecture.site import Site, Unfit
from ..architecture.targets import Target, choose, patterns
from ..errors import MedpeftError, listed, require, require_choice
from ..table import Row, Table
from .build import Planned, build, count_new
from .refusals import refuse


@dataclass
class Plan:
    """What `apply` would do: every site and every parameter that would train. Print it.

    Attributes:
        model: The model, untouched.
        methods: Every method with its options.
        sites: Method and site of every adapter.
        selected: Existing parameters that would train, by name, with their method; "head" for the head's.
        record: What `apply` would leave on the model.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(medpeft.plan(model, "bias", head="2"))
        bias on Sequential
        ------------------------------------
        method  layer     type    parameters
        ------------------------------------
        bias    0.bias    Linear           8
        head    2.weight  Linear          16
        head    2.bias    Linear           2
        ------------------------------------
        total                             26
    """

    model: nn.Module
    methods: list[tuple[Method, dict[str, Any]]]
    sites: list[Planned]
    selected: dict[str, str]
    record: Applied

    def table(self) -> Table:
        """List one row per adapter and per layer with selected parameters: method, layer, type, parameters."""
        rows = []
        counted: set[nn.Parameter] = set()
        for item in build(self.model, self.sites, self.record, shapes_only=True):
            if item.first is None:
                type_name = type(item.site.layer).__name__
                rows.append(
                    Row(item.method.name, item.site.name, type_name, count_new(item.adapter, counted))
                )
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            if name in self.selected:
                owner = modules[name.rpartition(".")[0]]
                rows.append(Row(self.selected[name], name, type(owner).__name__, parameter.numel()))
        return Table(f"{self.record.name} on {type(self.model).__name__}", rows)

    @property
    def trainable(self) -> int:
        """Parameters that would train, the head's included."""
        return sum(row.parameters for row in self.table().rows)

    def __str__(self) -> str:
        return str(self.table())


def plan(
    model: nn.Module,
    method: Methods,
    *,
    target: Target = None,
    exclude: Target = None,
    head: Head = "auto",
    batchnorm: str | None = None,
    keep_base: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> Plan:
    """Plan what `apply` with the same arguments would do; the model is untouched and nothing is computed.

    Raises:
        MedpeftError: as `apply`.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> medpeft.plan(model, "lora", rank=2, target="0", head="2").trainable
        42
    """
    refuse(model)
    requests = resolve(method, options)
    network = Network(model, find_head(model, head))
    sites: list[Planned] = []
    selected: dict[str, str] = {}
    for request in requests:
        picked = _pick(network, request, target, exclude)
        sites += [Planned(request.method, site) for site in picked.sites]
        for name in picked.parameters:
            selected.setdefault(name, request.method.name)
    for name, _ in model.named_parameters():
        if network.inside(name, network.head):
            selected[name] = "head"
    require(
        bool(sites or selected),
        f"{method!r} would train nothing: {type(model).__name__} has no head; pass head='name'.",
    )
    sites = _with_added_tokens(sites)
    record = _record(model, requests, sites, selected, network.head, batchnorm, keep_base)
    record.seed, record.dtype = seed, dtype
    return Plan(model, [(request.method, request.options) for request in requests], sites, selected, record)


def _record(
    model: nn.Module,
    requests: list[Request],
    sites: list[Planned],
    selected: dict[str, str],
    head: tuple[str, ...],
    batchnorm: str | None,
    keep_base: bool | None,
) -> Applied:
    """Write down what `apply` would leave on the model, with the defaults of a choice that was not made.

    Full fine-tuning adapts the statistics of BatchNorms and keeps no second copy of everything.
    """
    is_full = any(request.method.name == "full" for request in requests)
    if batchnorm is None:
        batchnorm = "adapt" if is_full else "frozen"
    require_choice("batchnorm", batchnorm, ("frozen", "adapt"))
    if keep_base is None:
        keep_base = not is_full
    return Applied(
        methods={request.method.name: request.options for request in requests},
        sites=[(planned.method.name, planned.site.name, planned.site.weight) for planned in sites],
        selected=selected,
        head=head,
        batchnorm=batchnorm,
        statistics=statistics_names(model) if batchnorm == "adapt" else [],
        trained_before={name: parameter.requires_grad for name, parameter in model.named_parameters()},
        base={} if keep_base else None,
    )


def plan_from(model: nn.Module, record: Applied) -> Plan:
    """Plan what a record describes, its sites found by layer and weight, whatever target picked them once.

    Raises:
        MedpeftError: a method, an option, or a site is unknown here; or as `apply`.
    """
    refuse(model)
    network = Network(model, record.head)
    methods = {name: (find(name), options) for name, options in record.methods.items()}
    for name, (method, options) in methods.items():
        unknown = [option for option in options if option not in method.options]
        require(
            not unknown,
            f"{name!r} has no option {', '.join(map(repr, unknown))}: {', '.join(method.options) or 'none'}.",
        )
    fitting = {
        name: _all_sites(network, *methods[name]) for name in dict.fromkeys(site[0] for site in record.sites)
    }
    sites = []
    missing = []
    for name, layer, weight in record.sites:
        site = fitting[name].get((layer, weight))
        if site is None:
            missing.append(f"{layer}.{weight}".strip("."))
        else:
            sites.append(Planned(methods[name][0], site))
    require(not missing, f"{record.name!r} fits no {listed(missing)} in this {type(model).__name__}.")
    return Plan(model, list(methods.values()), _with_added_tokens(sites), record.selected, record)


def _all_sites(network: Network, method: Method, options: dict[str, Any]) -> dict[tuple[str, str], Site]:
    """Map every site that the method fits, with a target or without, by layer and weight."""
    require(method.adapter is not None, f"{method.name!r} adds no adapters.")
    assert method.adapter is not None
    sites: dict[tuple[str, str], Site] = {}
    for targeted in (False, True):
        # With a target a method may fit more layers, and without one others.
        for site in method.adapter.sites(network, targeted=targeted, **method.options_of_sites(options)):
            if isinstance(site, Site):
                sites[site.name, site.weight] = site
    return sites


class _Picked(NamedTuple):
    """Sites of a method's adapters, and names of the existing parameters that it trains."""

    sites: list[Site]
    parameters: list[str]


def _pick(network: Network, request: Request, target: Target, exclude: Target) -> _Picked:
    """Find what a method adapts and trains, and keep what the target picks and the exclusion does not.

    Raises:
        MedpeftError: nothing is left.
    """
    method = request.method
    target = request.places.get("target", target)
    exclude = request.places.get("exclude", exclude)
    offers: list[Site | Unfit] = []
    if method.adapter is not None:
        site_options = method.options_of_sites(request.options)
        offers = list(method.adapter.sites(network, targeted=bool(patterns(target)), **site_options))
    owner_of = {name: name.rpartition(".")[0] for name in _selected(network, request)}
    places = list(dict.fromkeys([*(offer.name for offer in offers), *owner_of.values()]))
    if places or patterns(target):
        chosen = choose(network, places, target, exclude, method.name)
        offers = [offer for offer in offers if offer.name in chosen]
        owner_of = {name: owner for name, owner in owner_of.items() if owner in chosen}
    sites = [offer for offer in offers if isinstance(offer, Site)]
    unfit = next((offer for offer in offers if isinstance(offer, Unfit)), None)
    something = sites if method.adapter is not None else owner_of
    if not something and method.name != "linear_probe":
        raise MedpeftError(_fits_nothing(network, method, target, unfit))
    return _Picked(sites, list(owner_of))


def _selected(network: Network, request: Request) -> Iterator[str]:
    """Yield the names of the existing parameters that a method trains."""
    method = request.method
    predicate: Any = method.define
    options = method.own(request.options)
    if method.adapter is not None:
        if method.selects is None:
            return
        predicate, options = method.selects, {}
    for name, parameter in network.model.named_parameters():
        owner = name.rpartition(".")[0]
        if not (parameter.is_floating_point() or parameter.is_complex()):
            continue  # Integers have no gradient.
        if network.inside(owner, network.head):
            continue
        if predicate(name, parameter, network.layer(owner), **options):
            yield name


def _fits_nothing(network: Network, method: Method, target: Target, unfit: Unfit | None) -> str:
    """The message for a method that fits no layer of a model."""
    counts: dict[str, int] = {}
    for module in network.modules.values():
        if any(True for _ in module.parameters(recurse=False)):
            type_name = type(module).__name__
            counts[type_name] = counts.get(type_name, 0) + 1
    most = sorted(counts, key=lambda name: -counts[name])[:6]
    reason = f"{unfit.name} {unfit.reason}; " if unfit is not None else ""
    hint = method.hint or "see its docstring for the layers that it adapts."
    return (
        f"{method.name!r} found nothing to train in {type(network.model).__name__} (target={target!r}): "
        f"{reason}{hint} This model has {', '.join(most) or 'no parameters'}."
    )


def statistics_names(model: nn.Module) -> list[str]:
    """List the names of the buffers of every BatchNorm with running statistics."""
    names = []
    for layer_name, layer in with_statistics(model):
        for buffer_name, _ in layer.named_buffers(recurse=False):
            names.append(f"{layer_name}.{buffer_name}".lstrip("."))
    return names


def _with_added_tokens(sites: list[Planned]) -> list[Planned]:
    """Note at every site how many tokens the adapters of others insert there before the patches."""
    added = [0] * len(sites)
    for planned in sites:
        layout = planned.site.layout
        if layout is None or not layout.adds:
            continue
        region = _region(planned.site)
        for i, other in enumerate(sites):
            inside = f"{other.site.name}.".startswith(f"{region}.".lstrip("."))
            if inside and other is not planned:
                added[i] += layout.adds
    noted = []
    for planned, count in zip(sites, added, strict=True):
        site = planned.site
        if count and site.layout is not None:
            site = replace(site, layout=replace(site.layout, added=count))
        noted.append(Planned(planned.method, site))
    return noted


def _region(site: Site) -> str:
    """Name of the module within which the tokens of a site's adapter travel: up to a partner outside, where they leave."""
    for partner in site.partners:
        if not f"{partner.site.name}.".startswith(f"{site.name}."):
            return site.name.rpartition(".")[0]
    return site.name
