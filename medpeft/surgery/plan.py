"""Plan what `apply` would do, before anything changes: the adapters, and the parameters that would train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..adapters import by_place
from ..adapters.batchnorm import statistics_names
from ..adapters.options import require_common, require_options
from ..adapters.record import Applied, BatchNormPolicy
from ..adapters.registry import Method, find
from ..adapters.requests import Methods, resolve
from ..architecture.head import Head, find_head
from ..architecture.layers import within
from ..architecture.network import Network
from ..architecture.site import Site
from ..architecture.targets import Target
from ..errors import listed, require
from ..table import Row, Table, heading
from .build import Planned, build, count_new, in_order
from .pick import offers_of, pick
from .refusals import refuse


@dataclass
class Plan:
    """A plan of what `apply` would do: every adapter, and every parameter that would train. Print it.

    Attributes:
        model: The model, untouched.
        methods: Every method with its options.
        sites: Method and site of every adapter.
        selected: Method of every existing parameter that would train, by its name; "head" for the head's.
        record: The record that `apply` would leave on the model.

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
        """List one row per adapter and per selected parameter."""
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
        title = heading(self.record.name, type(self.model).__name__, self.record.depth)
        return Table(title, rows, notes=by_place.notes(self.record.methods))

    @property
    def trainable(self) -> int:
        """Number of parameters that would train, the head's included."""
        return sum(row.parameters for row in self.table().rows)

    def __str__(self) -> str:
        return str(self.table())


def plan(
    model: nn.Module,
    method: Methods,
    *,
    target: Target = None,
    exclude: Target = None,
    depth: float = 1.0,
    head: Head = "auto",
    batchnorm: BatchNormPolicy | None = None,
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
    require_common(depth=depth, keep_base=keep_base, dtype=dtype, seed=seed)
    requests = resolve(method, options)
    network = Network(model, find_head(model, head), depth)
    sites: list[Planned] = []
    selected: dict[str, str] = {}
    methods: list[tuple[Method, dict[str, Any]]] = []
    for request in requests:
        picked = pick(network, request, target, exclude)
        methods.append((request.method, picked.options))
        sites += [Planned(request.method, site) for site in picked.sites]
        for name in picked.parameters:
            selected.setdefault(name, request.method.name)
    for name, _ in model.named_parameters():
        if network.in_head(name):
            selected[name] = "head"
    require(
        bool(sites or selected),
        f"{method!r} would train nothing: {type(model).__name__} has no head; pass head='name'.",
    )
    sites = _with_added_tokens(in_order(sites))
    record = _record(network, methods, sites, selected, batchnorm, keep_base)
    record.seed, record.dtype = seed, dtype
    return Plan(model, methods, sites, selected, record)


def _record(
    network: Network,
    methods: list[tuple[Method, dict[str, Any]]],
    sites: list[Planned],
    selected: dict[str, str],
    batchnorm: BatchNormPolicy | None,
    keep_base: bool | None,
) -> Applied:
    """Make the record that `apply` would leave on the model, with defaults for `batchnorm` and `keep_base`.

    By default full fine-tuning adapts the statistics of BatchNorms, and keeps no second copy of everything.
    """
    is_full = any(method.name == "full" for method, _ in methods)
    if batchnorm is None:
        batchnorm = "adapt" if is_full else "frozen"
    require_options("", {"batchnorm": batchnorm}, {"batchnorm": BatchNormPolicy})
    if keep_base is None:
        keep_base = not is_full
    return Applied(
        methods={method.name: options for method, options in methods},
        sites=[(planned.method.name, planned.site.name, planned.site.weight) for planned in sites],
        selected=selected,
        head=network.head,
        batchnorm=batchnorm,
        statistics=statistics_names(network) if batchnorm == "adapt" else [],
        trained_before={name: weight.requires_grad for name, weight in network.model.named_parameters()},
        base={} if keep_base else None,
        depth=float(network.depth),
    )


def plan_from(model: nn.Module, record: Applied) -> Plan:
    """Plan what a record describes. Its sites are found by layer and weight, without the original target.

    Raises:
        MedpeftError: a method, an option or a site is unknown here; or as `apply`.
    """
    refuse(model)
    network = Network(model, record.head, record.depth)
    asked = {name: (find(name), options) for name, options in record.methods.items()}
    for name, (method, options) in asked.items():
        unknown = [option for option in options if option not in method.options]
        require(
            not unknown,
            f"{name!r} has no option {', '.join(map(repr, unknown))}: {', '.join(method.options) or 'none'}.",
        )
    fitting = {
        name: _all_sites(network, *asked[name]) for name in dict.fromkeys(site[0] for site in record.sites)
    }
    sites = []
    missing = []
    for name, layer, weight in record.sites:
        site = fitting[name].get((layer, weight))
        if site is None:
            missing.append(f"{layer}.{weight}".strip("."))
        else:
            sites.append(Planned(asked[name][0], site))
    require(not missing, f"{record.name!r} fits no {listed(missing)} in this {type(model).__name__}.")
    return Plan(model, list(asked.values()), _with_added_tokens(sites), record.selected, record)


def _all_sites(network: Network, method: Method, options: dict[str, Any]) -> dict[tuple[str, str], Site]:
    """Map every site that the method fits, with or without a target, by layer and weight."""
    require(method.adapter is not None, f"{method.name!r} adds no adapters.")
    sites: dict[tuple[str, str], Site] = {}
    for targeted in (False, True):
        # A method may fit layers only with a target, and others only without one.
        for site in offers_of(network, method, options, targeted=targeted):
            if isinstance(site, Site):
                sites[site.name, site.weight] = site
    return sites


def _with_added_tokens(sites: list[Planned]) -> list[Planned]:
    """Note at every site how many tokens other adapters insert there before the patches."""
    added = [0] * len(sites)
    for planned in sites:
        layout = planned.site.layout
        if layout is None or not layout.adds:
            continue
        region = _region(planned.site)
        for i, other in enumerate(sites):
            inside = not region or within(other.site.name, [region])
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
    """Name of the module inside which the tokens of a site's adapter are present.

    It is the site's layer, or the module around it if a partner outside the layer takes the tokens off.
    """
    for partner in site.partners:
        if not within(partner.site.name, [site.name]):
            return site.name.rpartition(".")[0]
    return site.name
