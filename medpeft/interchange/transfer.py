"""The changes of a whole model: out of it, and from a file into it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.by_place import ByPlace
from ..adapters.record import Adapted, Applied, own_tensors, trained_tensors
from ..architecture.head import Head
from ..architecture.layers import within
from ..architecture.network import Network
from ..architecture.site import Site
from ..checkpoint.compatibility import require_nothing_else_trains, require_values
from ..checkpoint.file import short
from ..checkpoint.fingerprint import class_of
from ..checkpoint.messages import as_lines
from ..errors import CheckpointError, MedpeftError
from ..formulas.loha import LoHa
from ..formulas.lokr import LoKr
from ..formulas.lora import LoRA
from ..sharding import reshard
from ..surgery.apply import carry_out
from ..surgery.build import build
from ..surgery.install import Built
from ..surgery.plan import Plan, plan
from .by_layer import joined
from .changes import Change
from .formats import Format, attention_around, in_whole_attention, inexpressible
from .hadamard import hadamard_of, options_of_loha
from .kronecker import kronecker_of, options_of_lokr
from .lora_file import LoRAFile
from .matrices import Factors, changed_parts, columns_by_part, factors_of

_BIASES = ("bias", "bitfit")


def export(adapted: Adapted, into: Format) -> dict[str, Change]:
    """Take the change of every layer from an adapted model, by name of the layer.

    Raises:
        CheckpointError: the format cannot express something; all of it is named.
    """
    model = adapted.model
    reshard(model)
    require_values(model)
    require_nothing_else_trains(model, adapted.record)
    if not adapted.acting:
        raise CheckpointError("Leave medpeft.disabled, scaled or merged first: its head is not as trained.")
    problems = _inexpressible_options(adapted.record, into)
    changes: dict[str, Change] = {}
    network = Network(model)
    for name, layer, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            reason = inexpressible(network, name, adapter, into)
            if not reason and name in changes:
                reason = f"it has two adapters, and {into.name} reads one a layer"
            if reason:
                problems.append(f"{name}: {reason}")
            elif isinstance(adapter, (LoRA, LoHa, LoKr)):  # Other methods are among the problems already.
                changes[name] = _change_of(layer, adapter)
    if problems:
        raise CheckpointError("\n  ".join([f"This model cannot be written for {into.name}:", *problems]))
    return changes


def _change_of(layer: nn.Module, adapter: LoRA | LoHa | LoKr) -> Change:
    """Copy the change that an adapter makes to its layer."""
    if isinstance(adapter, LoRA):
        return factors_of(layer, adapter)
    if isinstance(adapter, LoHa):
        return hadamard_of(adapter)
    return kronecker_of(adapter)


def _inexpressible_options(record: Applied, into: Format) -> list[str]:
    """List the methods and options that have no place in the file."""
    problems = []
    held = {*into.methods, "linear_probe"}  # It adds nothing but the head, which is asked about below.
    if into.biases:
        held.update(_BIASES)
    has_others = bool(set(record.methods) - held)
    has_its_own = bool(set(record.methods) & set(into.methods))
    if has_others or not has_its_own:
        problems.append(
            f"the methods {'+'.join(record.methods)}: these files hold {', '.join(into.methods)} alone"
        )
    if record.statistics:
        problems.append("adapting BatchNorm statistics: use batchnorm='frozen'")
    if record.head and not into.head:
        problems.append(f"the head {', '.join(record.head)}: apply with head=None")
    for method, options in record.methods.items():
        if method not in into.methods:
            continue
        by_place = [option for option in into.of_all if isinstance(options.get(option), ByPlace)]
        if by_place:
            problems.append(f"{', '.join(by_place)} by place: these files have one for all layers")
        lacking = [option for option in into.lacks if options.get(option) is not None]
        if lacking:
            problems.append(f"{', '.join(lacking)}: {into.name} has no such option")
    return problems


def apply_file(
    model: nn.Module,
    file: LoRAFile,
    written_for: Format,
    *,
    head: Head = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> nn.Module:
    """Apply the methods that a file needs to its layers, and load it.

    A factor of the file is multiplied into its matrices, so that all layers have a factor of 1.

    Args:
        model: The base.
        file: The file, in the names of the model.
        written_for: Its format.
        head: As in `apply`.
        options: Further options by method, and selective methods that the file trained beside its own.

    Raises:
        CheckpointError: something does not fit. All of it is listed, and the model is untouched.
    """
    require_values(model)
    others = _without_frozen(model, file.others)
    try:
        planned = _plan(model, file.changes, head, options or {})
        # Shapes first: a file may ask for any size.
        without_values = build(planned.model, planned.sites, planned.record, shapes_only=True)
        problems = list(_misfits(planned, without_values, file.changes, written_for))
        problems += _misfits_of_others(planned, others)
        if problems:
            raise CheckpointError("\n  " + as_lines(problems))
        built = build(planned.model, planned.sites, planned.record)
        for item in built:
            file.changes[item.site.name].fill(item.adapter, item.site)
    except MedpeftError as error:
        raise CheckpointError(f"{file.name} does not fit this {class_of(model).__name__}: {error}") from error
    carry_out(planned, built, others)
    return model


def _without_frozen(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors that the model already has, frozen and with the same values.

    peft saves modules whole, with their frozen tensors and buffers.
    """
    changed = dict(tensors)
    for name, tensor in own_tensors(model):
        is_frozen = not tensor.requires_grad or not tensor.is_floating_point()
        if not is_frozen or name not in changed:
            continue
        if torch.equal(changed[name].double(), tensor.cpu().double()):  # Their dtypes may differ.
            del changed[name]
    return changed


def _plan(
    model: nn.Module, changes: Mapping[str, Change], head: Head, options: Mapping[str, Mapping[str, Any]]
) -> Plan:
    """Plan each method at the layers that a file changes by it.

    A first plan, at rank 1, finds the sites. From each change and its site follow the options that hold it.
    """
    names: dict[str, set[str]] = {}
    for name, change in changes.items():
        names.setdefault(change.method, set()).add(name)
    requests: dict[str, dict[str, Any]] = {}
    for method, chosen in names.items():
        requests[method] = {"rank": 1, "target": _target_of(chosen)}
    if "lora" in requests:
        requests["lora"]["parts"] = "qkvo"
    sites = {site.name: site for _, site in plan(model, requests, head=head).sites}
    for method in requests:
        requests[method].update(_options(method, changes, sites))
    for method, further in options.items():
        requests.setdefault(method, {}).update(further)
    return plan(model, requests, head=head)


def _target_of(names: set[str]) -> Any:
    """Make a target of layers by their names."""
    return lambda name, layer: name in names


def _options(method: str, changes: Mapping[str, Change], sites: Mapping[str, Site]) -> dict[str, Any]:
    """Choose the options of a method with which its adapters hold what a file holds."""
    changes = {name: change for name, change in changes.items() if change.method == method}
    sites = {name: site for name, site in sites.items() if name in changes}
    if method == "loha":
        return options_of_loha(changes, sites)  # type: ignore[arg-type]  # all are of this method
    if method == "lokr":
        return options_of_lokr(changes, sites)  # type: ignore[arg-type]  # all are of this method
    return _options_of_lora(changes, sites)  # type: ignore[arg-type]  # all are of this method


def _options_of_lora(changes: Mapping[str, Factors], sites: Mapping[str, Site]) -> dict[str, Any]:
    """Choose the parts that are changed, and for each layer the largest rank that any of its parts needs."""
    parts: set[str] = set()
    of_layers = {}
    for name, site in sites.items():
        change = changes[name]
        parts.update(changed_parts(change, site))
        of_layers[name] = {
            "rank": max(1, *map(len, columns_by_part(change, site))),
            "dora": change.magnitude is not None,
            "bias": change.bias is not None,
        }
    options = joined(of_layers, {"rank": 1, "dora": False, "bias": False})
    return {"parts": "".join(sorted(parts)) or "qkvo", **options}


def _misfits(
    planned: Plan, built: list[Built], changes: Mapping[str, Change], written_for: Format
) -> Iterator[str]:
    """List every layer of a file that does not fit the plan."""
    network = Network(planned.model)
    by_layer = {item.site.name: (item.site, item.adapter) for item in built}
    for layer, change in changes.items():
        if layer in by_layer:
            continue
        reason = f"the model has no such layer for {change.method}"
        if within(layer, planned.record.head):
            reason = "it is the head, trained whole: pass head=None"
        yield f"{layer!r}: in the file, but {reason}"
    for layer, (site, adapter) in by_layer.items():
        # What that library does not compute, its file cannot mean.
        reason = inexpressible(network, layer, adapter, written_for) or changes[layer].misshapen(site)
        # Of those whose weight alone is read, that library has nn.MultiheadAttention.
        if not reason and site.only_weight and not _whole_attention(network, layer, changes):
            reason = (
                f"{written_for.name} adapts nn.MultiheadAttention as a whole, and the file holds half of it"
            )
        if reason:
            yield f"{layer!r}: {reason}"


def _whole_attention(network: Network, layer: str, changes: Mapping[str, Change]) -> bool:
    """Whether a file changes both projections of an attention, as peft does."""
    attention = attention_around(layer)
    both = attention in changes and f"{attention}.out_proj".lstrip(".") in changes
    return both and in_whole_attention(network, layer)


def _misfits_of_others(planned: Plan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """List every other tensor of a file, of a head or of biases, that does not fit what trains."""
    trained = dict(trained_tensors(planned.model, planned.record))
    head = ", ".join(planned.record.head) or "(none)"
    for name, tensor in tensors.items():
        if name not in trained:
            yield (
                f"{name!r}: in the file, and neither a change of a layer nor in the head {head}: head= takes "
                "the names of all modules that the file holds whole"
            )
            continue
        target = trained[name]
        if target.shape != tensor.shape or target.is_floating_point() != tensor.is_floating_point():
            yield f"{name!r}: {_described(tensor)} in the file, {_described(target)} in the model"


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {short(tensor.dtype)}"
