"""LoRA of a whole model: out of it as factors, and from a file into it."""

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
from ..checkpoint.compatibility import require_nothing_else_trains, require_values
from ..checkpoint.file import short
from ..checkpoint.fingerprint import class_of
from ..errors import CheckpointError, MedpeftError
from ..formulas.lora import LoRA
from ..sharding import reshard
from ..surgery.apply import carry_out
from ..surgery.build import build
from ..surgery.plan import Plan, plan
from .lora_file import LoRAFile
from .matrices import Factors, changed_parts, columns_by_part, factors_of, fill, inexpressible, misshapen


def export_factors(adapted: Adapted, *, with_head: bool) -> dict[str, Factors]:
    """Take the factors of every layer from an adapted model, by name of the layer.

    `with_head` says whether the format has room for a head.

    Raises:
        CheckpointError: something cannot be expressed; all of it is named.
    """
    model = adapted.model
    reshard(model)
    require_values(model)
    require_nothing_else_trains(model, adapted.record)
    if not adapted.acting:
        raise CheckpointError("Leave medpeft.disabled, scaled or merged first: its head is not as trained.")
    problems = _inexpressible_options(adapted.record, with_head)
    factors: dict[str, Factors] = {}
    network = Network(model)
    for name, layer, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            reason = inexpressible(network, name, adapter)
            if reason:
                problems.append(f"{name}: {reason}")
            elif isinstance(adapter, LoRA):
                factors[name] = factors_of(layer, adapter)
    if problems:
        heading = "This model cannot be written as LoRA of peft or diffusers:"
        raise CheckpointError("\n  ".join([heading, *problems]))
    return factors


def _inexpressible_options(record: Applied, with_head: bool) -> list[str]:
    """List the methods and options beside LoRA that have no place in the file."""
    problems = []
    if "lora" not in record.methods or not set(record.methods) <= {"lora", "linear_probe"}:
        problems.append(f"the methods {'+'.join(record.methods)}: these files hold LoRA alone")
    if record.statistics:
        problems.append("adapting BatchNorm statistics: use batchnorm='frozen'")
    if record.head and not with_head:
        problems.append(f"the head {', '.join(record.head)}: apply with head=None")
    if isinstance(record.methods.get("lora", {}).get("dropout"), ByPlace):
        problems.append("dropout by place: these files have one for all layers")
    return problems


def apply_file(model: nn.Module, file: LoRAFile, *, head: Head, dropout: float) -> nn.Module:
    """Apply `lora` with a factor of 1 to the layers of a file, each with its rank, and load the file.

    Raises:
        CheckpointError: something does not fit. All of it is listed, and the model is untouched.
    """
    require_values(model)
    others = _without_frozen(model, file.others)
    try:
        planned = _plan(model, file.factors, head, dropout)
        problems = [*_misfits(planned, file.factors), *_misfits_of_head(planned, others)]
        if problems:
            raise CheckpointError("\n  ".join(["", *problems]))
        built = build(planned.model, planned.sites, planned.record)
        for item in built:
            site, adapter = item.site, item.adapter
            assert isinstance(adapter, LoRA)
            fill(adapter, site, file.factors[site.name])
    except MedpeftError as error:
        raise CheckpointError(f"{file.name} does not fit this {class_of(model).__name__}: {error}") from error
    carry_out(planned, built, others)
    return model


def _without_frozen(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out tensors that the model already has, frozen and with the same values."""
    changed = dict(tensors)
    for name, tensor in own_tensors(model):
        frozen = not tensor.requires_grad or not tensor.is_floating_point()
        if frozen and name in changed and torch.equal(changed[name], tensor.cpu()):
            del changed[name]
    return changed


def _plan(model: nn.Module, factors: Mapping[str, Factors], head: Head, dropout: float) -> Plan:
    """Plan `lora` at the layers of a file, each with the largest rank that any part of it needs.

    A first plan finds the layers' parts. B then says which of them the file changes, and by how many columns.
    """
    options: dict[str, Any] = {"dropout": dropout, "target": lambda name, layer: name in factors}
    first = plan(model, {"lora": {**options, "parts": "qkvo", "rank": 1}}, head=head)
    parts: set[str] = set()
    ranks = ByPlace()
    for _, site in first.sites:
        if site.weight != "weight":
            ranks.setdefault(site.name, 1)
            continue  # Reported later: peft adapts no other weight.
        layer = factors[site.name]
        parts.update(changed_parts(layer, site))
        ranks[site.name] = max(1, *map(len, columns_by_part(layer, site)))
    options["parts"] = "".join(sorted(parts)) or "qkvo"
    return plan(model, {"lora": {**options, "rank": ranks or 1}}, head=head)


def _misfits(planned: Plan, factors: Mapping[str, Factors]) -> Iterator[str]:
    """List every layer of a file that does not fit the plan."""
    network = Network(planned.model)
    built = build(planned.model, planned.sites, planned.record, shapes_only=True)
    sites = {item.site.name: (item.site, item.adapter) for item in built}
    for layer in factors:
        if layer in sites:
            continue
        reason = "the model has no such layer for LoRA"
        if within(layer, planned.record.head):
            reason = "it is the head, trained whole: pass head=None"
        yield f"{layer!r}: in the file, but {reason}"
    for layer, (site, adapter) in sites.items():
        reason = inexpressible(network, layer, adapter) or misshapen(factors[layer], site)
        if reason:
            yield f"{layer!r}: {reason}"


def _misfits_of_head(planned: Plan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """List every other tensor of a file that does not fit the head."""
    trained = dict(trained_tensors(planned.model, planned.record))
    head = ", ".join(planned.record.head) or "(none)"
    for name, tensor in tensors.items():
        if name not in trained:
            yield f"{name!r}: in the file, and neither LoRA nor in the head {head}"
            continue
        target = trained[name]
        if target.shape != tensor.shape or target.is_floating_point() != tensor.is_floating_point():
            yield f"{name!r}: {_described(tensor)} in the file, {_described(target)} in the model"


def _described(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {short(tensor.dtype)}"
