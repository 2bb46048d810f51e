"""A LoRA adapter as other libraries write it: one A and one B for a whole layer, whatever its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.record import Applied, adapted_layers, own_tensors, trained_tensors
from ..architecture.convolution import slides_plainly
from ..architecture.head import Head
from ..architecture.network import Network
from ..architecture.site import Site
from ..checkpoint.compatibility import require_nothing_else_trains, require_values, within
from ..checkpoint.file import short
from ..checkpoint.fingerprint import class_of
from ..checkpoint.load import settle
from ..checkpoint.save import plain
from ..errors import CheckpointError, MedpeftError
from ..formulas.lora import LoRA
from ..sharding import reshard, whole
from ..surgery.build import build
from ..surgery.plan import Plan, plan


class Factors:
    """One layer's LoRA as peft writes it: A (r, fan-in …), B (out, r, 1 …) and the factor of their product."""

    def __init__(self, A: Tensor, B: Tensor, scale: float) -> None:
        self.A, self.B, self.scale = A, B, scale

    @property
    def rank(self) -> int:
        """r, the parts of a fused projection taken together."""
        return self.A.shape[0]


def exported(model: nn.Module, record: Applied, *, with_head: bool) -> dict[str, Factors]:
    """The factors of every layer; a `CheckpointError` names all that cannot be expressed."""
    reshard(model)
    require_values(model)
    require_nothing_else_trains(model, record)
    problems = []
    others = [name for name in record.methods if name not in ("lora", "linear_probe")]
    if others or "lora" not in record.methods:
        problems.append(f"the methods {'+'.join(record.methods)}: these files hold LoRA alone")
    if record.statistics:
        problems.append("adapting BatchNorm statistics: use batchnorm='frozen'")
    if record.head and not with_head:
        problems.append(f"the head {', '.join(record.head)}: apply with head=None")
    found: dict[str, Factors] = {}
    network = Network(model)
    for name, layer, adapters in adapted_layers(model):
        for adapter in adapters.children():
            reason = inexpressible(network, name, adapter)
            if reason:
                problems.append(f"{name}: {reason}")
            elif isinstance(adapter, LoRA):
                found[name] = _factors(layer, adapter)
    if problems:
        raise CheckpointError("This model cannot be written as LoRA of peft or diffusers:\n  " + "\n  ".join(problems))
    return found


def inexpressible(network: Network, name: str, adapter: nn.Module) -> str:
    """Why peft cannot compute what the adapter does, "" if it can."""
    layer: Any = network.modules[name]
    if not isinstance(adapter, LoRA):
        return ""  # The methods are named already.
    if adapter.magnitude is not None:
        return "DoRA is not written"
    if adapter.kind not in ("linear", "conv"):
        return f"{type(layer).__name__} is no Linear and no convolution"
    if adapter._weight != "weight" or network.readers(layer, "weight", "bias"):
        return "other code reads its weight without calling it, so that peft's wrapper would not act"
    if adapter.kind == "linear":
        return ""
    odd = [k for k, v in (("groups", 1), ("padding_mode", "zeros")) if getattr(layer, k) != v]
    odd += ["dilation"] if set(layer.dilation) != {1} else []
    odd += [] if slides_plainly(layer) else ["what this class does to its weight or input"]
    return f"peft's convolutions ignore {' and '.join(odd)}" if odd else ""


def _factors(layer: nn.Module, adapter: LoRA) -> Factors:
    """A and B of a whole layer: one block for each part, one more for what PiSSA and OLoRA take off."""
    pairs = [(whole(adapter.down), whole(adapter.up))]
    if adapter.start:
        pairs.append((whole(adapter.down_start), -whole(adapter.up_start)))
    weight: Any = layer._parameters["weight"]
    channels = weight.shape[0]
    sizes = [row.size * row.groups for row in adapter.rows] or [channels]
    indices = [row.indices(channels) for row in adapter.rows] or [list(range(channels))]
    A = torch.cat([down for down, _ in pairs])
    B = A.new_zeros(channels, A.shape[0])
    column = 0
    for _, up in pairs:
        for rows, part in zip(indices, up.split(sizes), strict=True):
            B[rows, column : column + adapter.rank] = part
            column += adapter.rank
    if adapter.kind == "conv":
        A, B = A.view(-1, *weight.shape[1:]), B.view(*B.shape, *[1] * (weight.ndim - 2))
    return Factors(plain(A), plain(B), float(adapter.scale))


def apply_factors(
    model: nn.Module, factors: Mapping[str, Factors], rest: Mapping[str, Tensor], name: str, *, head: Head, dropout: float
) -> nn.Module:
    """Apply `lora` with one rank and a factor of 1 to the layers of a file, and load it; all or nothing.

    Args:
        model: A model that is not adapted.
        factors: By name of the layer.
        rest: Tensors of the head, by name in the model.
        name: Of the file.
        head: As in `apply`.
        dropout: As in `lora`.

    Raises:
        CheckpointError: something does not fit; everything that does not is listed.
    """
    require_values(model)
    frozen = {name: tensor for name, tensor in own_tensors(model) if not tensor.requires_grad or not tensor.is_floating_point()}
    rest = {name: t for name, t in rest.items() if name not in frozen or not torch.equal(t, frozen[name].cpu())}
    try:
        planned = _planned(model, factors, head, dropout)
        problems = _misfits(planned, factors, rest)
        if problems:
            raise CheckpointError("\n  " + "\n  ".join(problems))
        built = build(model, planned.sites, planned.record)
        for item in built:
            assert isinstance(item.adapter, LoRA)
            _fill(item.adapter, item.site, factors[item.site.name])
    except MedpeftError as error:
        raise CheckpointError(f"{name} does not fit this {class_of(model).__name__}: {error}") from error
    settle(planned, built, dict(rest))
    return model


def _planned(model: nn.Module, factors: Mapping[str, Factors], head: Head, dropout: float) -> Plan:
    """The plan with the largest rank of any layer, where each part of a fused projection needs its own columns alone."""
    wanted: dict[str, Any] = {"dropout": dropout, "target": lambda name, layer: name in factors}
    planned = plan(model, {"lora": {**wanted, "parts": "qkvo", "rank": 1}}, head=head)
    sites = [(factors[site.name], site) for _, site in planned.sites if site.weight == "weight"]
    parts = {part for f, site in sites for part in _parts(f, site)}
    rank = max((len(columns) for f, site in sites for columns in _columns(f, site)), default=1)
    return plan(model, {"lora": {**wanted, "parts": "".join(sorted(parts)) or "qkvo", "rank": rank}}, head=head)


def _parts(f: Factors, site: Site) -> str:
    """The parts of a layer that its B changes, all if it changes none."""
    B = f.B.flatten(1)
    if len(B) != site.host.shape[0]:
        return site.parts
    return "".join(row.part for row in site.rows if B[row.indices(len(B))].any()) or site.parts


def _columns(f: Factors, site: Site) -> list[list[int]]:
    """Of every part of a layer, the columns of B that it uses: in a block-diagonal B, its own block."""
    B = f.B.flatten(1)
    every = list(range(f.rank))
    if len(site.rows) < 2 or len(B) != site.host.shape[0]:
        return [every]
    used = [torch.nonzero(B[row.indices(len(B))].abs().sum(0)).flatten().tolist() for row in site.rows]
    return used if any(used) else [every] * len(used)


def _misfits(planned: Plan, factors: Mapping[str, Factors], rest: Mapping[str, Tensor]) -> list[str]:
    """Everything that does not fit the plan."""
    sites = {i.site.name: (i.site, i.adapter) for i in build(planned.model, planned.sites, planned.record, shapes_only=True)}
    own, network = dict(trained_tensors(planned.model, planned.record)), Network(planned.model)
    lines = []
    for layer in factors:
        if layer not in sites:
            is_head = within(layer, planned.record.head)
            why = "it is the head, trained whole: pass head=None" if is_head else "the model has no such layer for LoRA"
            lines.append(f"{layer!r}: in the file, but {why}")
    for layer, (site, adapter) in sites.items():
        reason = inexpressible(network, layer, adapter) or _misshapen(factors[layer], site)
        lines += [f"{layer!r}: {reason}"] if reason else []
    for key, value in rest.items():
        if key not in own:
            lines.append(f"{key!r}: in the file, and neither LoRA nor in the head {', '.join(planned.record.head) or '(none)'}")
        elif own[key].shape != value.shape or own[key].is_floating_point() != value.is_floating_point():
            found, wanted = (f"{tuple(t.shape)} {short(t.dtype)}" for t in (value, own[key]))
            lines.append(f"{key!r}: {found} in the file, {wanted} in the model")
    return lines


def _misshapen(f: Factors, site: Site) -> str:
    host = site.host
    A, B = (f.rank, *host.shape[1:]), (host.shape[0], f.rank, *[1] * (host.ndim - 2))
    if tuple(f.A.shape) != A or tuple(f.B.shape) != B:
        return f"A {tuple(f.A.shape)} and B {tuple(f.B.shape)} in the file, {A} and {B} fit the layer"
    if not f.A.is_floating_point() or not f.B.is_floating_point():
        return f"A and B are {f.A.dtype} and {f.B.dtype}"
    if site.rows:
        covered = {i for row in site.rows for i in row.indices(len(f.B))}
        others = [i for i in range(len(f.B)) if i not in covered]
        if f.B[others].any():
            return "the file changes rows of the layer that are neither query, key nor value"
    return ""


@torch.no_grad()
def _fill(adapter: LoRA, site: Site, f: Factors) -> None:
    """Put A and B into an adapter; where its rank is larger, A's rows left over keep their random start and B is zero."""
    A, B = f.A.flatten(1), f.B.flatten(1) * f.scale
    rows = [row.indices(len(B)) for row in adapter.rows] or [list(range(len(B)))]
    adapter.up.zero_()
    start = 0
    for part, (indices, columns) in enumerate(zip(rows, _columns(f, site), strict=True)):
        first = part * adapter.rank
        adapter.down[first : first + len(columns)] = A[columns].to(adapter.down)
        adapter.up[start : start + len(indices), : len(columns)] = B[indices][:, columns].to(adapter.up)
        start += len(indices)
