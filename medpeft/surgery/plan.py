"""What `apply` would do: the sites and parameters that a request picks, found before anything changes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.adapter import Adapter
from ..adapters.batchnorm import with_statistics
from ..adapters.record import Applied, applied, require_applied
from ..adapters.registry import Method, Methods, find, resolve
from ..architecture.head import Head, find_head
from ..architecture.network import Network
from ..architecture.site import Site
from ..architecture.targets import Target, choose, patterns
from ..errors import MedpeftError, require, require_choice
from ..table import Row, Table


@dataclass
class Plan:
    """What `apply` would do: every site and every parameter that would train. Print it.

    Attributes:
        sites: Method and site of every adapter.
        selected: Existing parameters that would train, by name, with their method; "head" for the head's.
        record: What `apply` would leave on the model.
    """

    model: nn.Module
    methods: list[tuple[Method, dict[str, Any]]]
    sites: list[tuple[Method, Site]]
    selected: dict[str, str]
    record: Applied

    def table(self) -> Table:
        """One row per adapter and per layer with selected parameters: method, layer, type, parameters."""
        seen: set[nn.Parameter] = set()
        rows = [
            Row(method.name, site.name, type(site.layer).__name__, _count(adapter, seen))
            for method, site, adapter in build(self, dry=True)
        ]
        modules = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            if name in self.selected:
                owner = name.rpartition(".")[0]
                rows.append(Row(self.selected[name], name, type(modules[owner]).__name__, parameter.numel()))
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
    """What `apply` with the same arguments would do; the model is untouched and nothing is computed.

    Raises:
        MedpeftError: as `apply`.
    """
    _refuse(model)
    resolved = resolve(method, options)
    network = Network(model, find_head(model, head))
    sites: list[tuple[Method, Site]] = []
    selected: dict[str, str] = {}
    for chosen, own, where in resolved:
        wanted, unwanted = where.get("target", target), where.get("exclude", exclude)
        here, names = _picked(network, chosen, own, wanted, unwanted)
        sites += [(chosen, site) for site in here]
        selected = {**dict.fromkeys(names, chosen.name), **selected}
    heads = [n for n, _ in model.named_parameters() if network.inside(n, network.head)]
    selected |= dict.fromkeys(heads, "head")
    require(bool(sites or selected), f"{method!r} would train nothing: {type(model).__name__} has no head; pass head='name'.")
    full = any(chosen.name == "full" for chosen, _, _ in resolved)
    policy = batchnorm if batchnorm is not None else ("adapt" if full else "frozen")
    require_choice("batchnorm", policy, ("frozen", "adapt"))
    record = Applied(
        methods={chosen.name: own for chosen, own, _ in resolved},
        sites=[(chosen.name, site.name, site.weight) for chosen, site in sites],
        selected=selected,
        head=network.head,
        batchnorm=policy,
        statistics=statistics_names(model) if policy == "adapt" else [],
        trained_before={name: p.requires_grad for name, p in model.named_parameters()},
        base=None if keep_base is False or (keep_base is None and full) else {},
        seed=seed,
        dtype=dtype,
    )
    return Plan(model, [(chosen, own) for chosen, own, _ in resolved], sites, selected, record)


def plan_from(model: nn.Module, record: Applied) -> Plan:
    """The plan that a record describes, its sites found by layer and weight, whatever target picked them once.

    Raises:
        MedpeftError: a method, an option, or a site is unknown here; or as `apply`.
    """
    _refuse(model)
    network = Network(model, record.head)
    methods = {name: (find(name), options) for name, options in record.methods.items()}
    for name, (chosen, own) in methods.items():
        unknown = [option for option in own if option not in chosen.options]
        require(not unknown, f"{name!r} has no option {', '.join(map(repr, unknown))}: {', '.join(chosen.options) or 'none'}.")
    by_method = {name: _all_sites(network, *methods[name]) for name in dict.fromkeys(site[0] for site in record.sites)}
    found = {(name, layer, weight): by_method[name].get((layer, weight)) for name, layer, weight in record.sites}
    missing = [f"{layer}.{weight}".strip(".") for (_, layer, weight), site in found.items() if site is None]
    shown = ", ".join(map(repr, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    require(not missing, f"{record.name!r} fits no {shown} in this {type(model).__name__}.")
    sites = [(methods[name][0], site) for (name, _, _), site in found.items() if site is not None]
    return Plan(model, list(methods.values()), sites, record.selected, record)


def _all_sites(network: Network, method: Method, options: dict[str, Any]) -> dict[tuple[str, str], Site]:
    """Every site that the method fits, with a target or without, by layer and weight."""
    require(method.adapter is not None, f"{method.name!r} adds no adapters.")
    assert method.adapter is not None
    found = (method.adapter.sites(network, targeted=t, **method.sites_with(options)) for t in (False, True))
    return {(site.name, site.weight): site for sites in found for site in sites if not site.unfit}


_SYNCHRONISED = ("DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel")
"""Classes of torch that look for a model's parameters once, when they get it."""


def _refuse(model: nn.Module) -> None:
    """Raise where hooks would not be seen or would be seen twice, or where ranks would train adapters each for itself."""
    if not isinstance(model, nn.Module):
        raise MedpeftError(f"{type(model).__name__} is no torch.nn.Module: pass the model itself.")
    here = applied(model)
    below = "" if here else next((n for n, m in model.named_modules() if applied(m) is not None), "")
    if here or below:
        name = here.name if here else require_applied(model.get_submodule(below)).name
        raise MedpeftError(
            f"This {type(model).__name__}{f' ({below})' if below else ''} is adapted already, by {name!r}: remove or merge "
            "that first, or apply both at once, as in 'lora+bias'."
        )
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise MedpeftError(
                f"{name or type(model).__name__} is compiled, and a compiled model does not see adapters added to it: apply "
                "first, then compile."
            )
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _SYNCHRONISED), "")
        if wrapper:
            raise MedpeftError(
                f"{name or type(model).__name__} is in {wrapper} already, which would not keep adapters added now the same on "
                "all ranks: apply first, then shard or wrap."
            )
        if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
            raise MedpeftError(f"{name} has no shape yet: run the model once, then apply.")
        if hasattr(module, "adapters") and any(True for _ in module.parameters(recurse=False)):
            raise MedpeftError(f"{name} has an attribute 'adapters' already, which medpeft needs for its own.")


def _picked(
    network: Network, method: Method, options: dict[str, Any], target: Target, exclude: Target
) -> tuple[list[Site], list[str]]:
    """The sites of a method's adapters, and the names of the existing parameters that it trains."""
    sites = []
    if method.adapter is not None:
        sites = list(method.adapter.sites(network, targeted=bool(patterns(target)), **method.sites_with(options)))
    owners = {name: name.rpartition(".")[0] for name in _selected(network, method, options)}
    places = list(dict.fromkeys([*(site.name for site in sites), *owners.values()]))
    if places or patterns(target):
        chosen = choose(network, places, target, exclude, method.name)
        sites = [site for site in sites if site.name in chosen]
        owners = {name: owner for name, owner in owners.items() if owner in chosen}
    fitting = [site for site in sites if not site.unfit]
    unfit = next((f"{site.name} {site.unfit}; " for site in sites if site.unfit), "")
    found = fitting if method.adapter is not None else owners
    require(bool(found) or method.name == "linear_probe", _fits_nothing(network, method, target, unfit))
    return fitting, list(owners)


def _selected(network: Network, method: Method, options: dict[str, Any]) -> Iterator[str]:
    predicate: Any = method.define
    if method.adapter is not None:
        if method.adapter.selects is Adapter.selects:
            return
        predicate, options = method.adapter.selects, {}
    for name, parameter in network.model.named_parameters():
        owner = name.rpartition(".")[0]
        if not (parameter.is_floating_point() or parameter.is_complex()):
            continue  # Integers have no gradient.
        if not network.inside(owner, network.head) and predicate(name, parameter, network.layer(owner), **method.own(options)):
            yield name


def _fits_nothing(network: Network, method: Method, target: Target, unfit: str) -> str:
    types: dict[str, int] = {}
    for module in network.modules.values():
        if any(True for _ in module.parameters(recurse=False)):
            types[type(module).__name__] = types.get(type(module).__name__, 0) + 1
    listed = ", ".join(sorted(types, key=lambda name: -types[name])[:6]) or "no parameters"
    hint = method.hint or "see its docstring for the layers that it adapts."
    return (
        f"{method.name!r} found nothing to train in {type(network.model).__name__} (target={target!r}): {unfit}{hint} "
        f"This model has {listed}."
    )


def statistics_names(model: nn.Module) -> list[str]:
    """Names of the buffers of every BatchNorm with running statistics."""
    return [f"{name}.{b}".lstrip(".") for name, layer in with_statistics(model) for b, _ in layer.named_buffers(recurse=False)]


def _count(adapter: Adapter, seen: set[nn.Parameter]) -> int:
    """Trainable parameters that no adapter before has counted."""
    new = {p for p in adapter.parameters() if p.requires_grad} - seen
    seen |= new
    return sum(p.numel() for p in new)


def build(planned: Plan, *, dry: bool = False) -> list[tuple[Method, Site, Adapter]]:
    """The adapters of a plan, on their layers' devices; shapes alone if `dry`."""
    options = {method.name: own for method, own in planned.methods}
    record = planned.record
    built = []
    shared: dict[tuple[str, torch.device], dict[Any, nn.Module]] = {}
    for method, site in tqdm(planned.sites, desc=record.name, delay=1.0, leave=False, disable=dry):
        seeded = torch.Generator().manual_seed(zlib.crc32(f"{record.seed}:{method.name}:{site.name}:{site.weight}".encode()))
        device, dtype = _place(site, planned.model)
        shapes_alone = dry or device.type == "meta"
        at = replace(site, generator=seeded, dry=dry, shared=shared.setdefault((method.name, device), {}))
        with torch.device("meta" if shapes_alone else "cpu"):
            adapter = method.define(at, **method.own(options[method.name]))
        assert isinstance(adapter, Adapter)
        _check_forms(method, site, adapter)
        adapter.to(device="meta" if shapes_alone else device, dtype=record.dtype or dtype)
        adapter.train(site.layer.training)
        adapter.method = method.name
        built.append((method, site, adapter))
    return built


def _check_forms(method: Method, site: Site, adapter: Adapter) -> None:
    can_merge = type(adapter).merged is not Adapter.merged
    if not adapter.on_output and not adapter.on_input and not can_merge:
        raise MedpeftError(
            f"{method.name!r} acts on the output of {site.name}, but {site.reader or 'its parent'} reads the layer's weight "
            "without calling it, so the output never is: exclude it, or use a method that acts on weights, such as 'lora'."
        )


def _place(site: Site, model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of an adapter: its layer's device; float32, or the layer's dtype if that is wider."""
    own = site.tensor(site.weight) if site.weight else None
    # A norm without weights is where the rest of the model is.
    for tensor in chain((own,), site.layer.parameters(), model.parameters()):
        if tensor is not None and tensor.is_floating_point():
            return tensor.device, torch.promote_types(tensor.dtype, torch.float32)
    return torch.device("cpu"), torch.float32


def state_of(built: Iterable[tuple[Method, Site, Adapter]]) -> Iterator[tuple[str, Tensor]]:
    """What `own_state` will find of adapters that are not in the model yet, shared tensors once."""
    seen: set[int] = set()
    for method, site, adapter in built:
        for key, tensor in adapter.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{site.name}.adapters.{method.name}{site.key}.{key}".lstrip("."), tensor
