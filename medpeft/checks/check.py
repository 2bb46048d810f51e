"""The proof that every trainable tensor acts: connected on fake tensors, then by its gradient on real values.

`check` is what to call; everything is tried on a twin of the model. `medpeft.connected.connected` is its first part alone, for
models without values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..adapters.adapter import parameters_of
from ..adapters.batchnorm import with_statistics
from ..adapters.record import Applied, adapted_layers, require_applied
from ..adapters.wiring import is_wired
from ..architecture.network import Network
from ..errors import MedpeftError
from .connections import Silent, connected
from .copies import real_twin, undisturbed
from .effects import inert


@dataclass
class Checked:
    """What `check` has shown. Print it.

    Attributes:
        tensors: Number of trainable tensors that act in train and in eval mode.
        parameters: Number of their elements.
        exempt: Names of trainable tensors that do not act, harmlessly, with the reason.
        notes: What could not be shown, and what else is worth knowing.
    """

    tensors: int
    parameters: int
    exempt: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        act = f"{self.tensors} trainable tensors ({self.parameters:,} parameters) act in train and in eval mode"
        exempt = [f"exempt: {names}: {reason}" for reason, names in _grouped(self.exempt).items()]
        more = [f"… and {len(exempt) - 6} more kinds of exemption"] if len(exempt) > 6 else []
        return "\n  ".join([act, *exempt[:6], *more, *(f"note: {note}" for note in self.notes)])


def check(model: nn.Module, example_input: Any, *, optimizer: torch.optim.Optimizer | None = None) -> Checked:
    """Prove that every trainable tensor of an adapted model reaches its output and moves it, in train and in eval mode.

    The model is not touched: everything runs on a copy that shares its frozen weights, and torch's random state is restored.

    Args:
        model: A model after `apply`, not yet compiled, sharded or wrapped. On the meta device, connections alone are checked.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs, on the model's device. In train mode a
            BatchNorm may need more than one image.
        optimizer: An optimizer, to check that it holds every trainable parameter and no replaced one.

    Returns:
        What was shown, and which tensors are exempt because they cannot act in any model, as a key's bias under a softmax.

    Raises:
        MedpeftError: a tensor cannot act, training would change what is frozen, a hook is lost, or the optimizer holds other
            parameters; everything found is named, with the reason if it is known. Or the model does not run on the input.
    """
    record = require_applied(model)
    problems = [*_hooks_lost(model), *_wrongly_trained(model, record), *_drifting(model, record)]
    if optimizer is not None:
        problems += _not_optimized(model, optimizer)
    silent, notes = _silent(model, example_input, record)
    network = Network(model, record.head)
    exempt = {s.name: why for s in silent if (why := _exemption(network, record, s))}
    problems += [(s.name, f"cannot act in {' and '.join(s.modes)} mode: {s.reason}") for s in silent if s.name not in exempt]
    if problems:
        raise MedpeftError(_message(model, problems))
    acting = [p for name, p in model.named_parameters() if p.requires_grad and name not in exempt]
    return Checked(len(acting), sum(p.numel() for p in acting), exempt, notes)


def _silent(model: nn.Module, example: Any, record: Applied) -> tuple[list[Silent], list[str]]:
    """Trainable tensors that do not act, and notes."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    silent: list[Silent] = []
    notes = []
    valueless = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    try:
        silent = connected(model, example).silent
    except MedpeftError as reason:
        if valueless:
            raise
        notes.append(f"real values alone were checked: {reason}")
    if valueless:
        return silent, [*notes, "the model has no values (meta device): connections alone were checked"]
    found = {s.name for s in silent}
    with undisturbed():
        dead, changed = inert(model, example, [name for name in names if name not in found])
    statistics = {f"{name}.{b}" for name, layer in with_statistics(model) for b, _ in layer.named_buffers(recurse=False)}
    notes += [f"{name}, a buffer, changes in training and is not saved" for name in changed if name not in statistics]
    return [*silent, *dead], notes


def _exemption(network: Network, record: Applied, silent: Silent) -> str:
    """Why a tensor that does not act does no harm; "" if it does."""
    name, selected = silent.name, record.selected.get(silent.name, "")
    if selected == "head" and silent.modes == ("eval",):
        return "an auxiliary head, which serves in training alone"
    layer, _, last = name.replace(".adapters.ssf.shift", ".bias").rpartition(".")
    if last == "bias" and _in_scores(network, layer):
        return "the softmax of the attention cancels what is added to every key, or to every score"
    if selected and last == "bias" and "normalises it away" in silent.reason:
        return silent.reason.partition(";")[0]
    return ""


def _in_scores(network: Network, layer: str) -> bool:
    """Whether a layer makes an attention's keys alone, or lies in it without being a projection, as a position MLP does."""
    for core, parts in network.attentions.items():
        projections = {f"{core}.{p.path}".strip("."): p.parts for p in parts}
        if layer in projections or network.inside(layer, [core]):
            return projections.get(layer, "k") == "k"
    return False


def _hooks_lost(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Adapted layers whose forward does not bring their adapters in."""
    for name, layer, adapters in adapted_layers(model):
        if any(True for _ in adapters.adapters()) and not is_wired(layer):
            yield (
                name,
                "has lost the forward of its adapters (was the layer converted, or its forward deleted?); convert first, then apply",
            )
        if not adapters.enabled:
            yield name, "has its adapters switched off; leave `with medpeft.disabled(…)` or `merged(…)` first"


def _wrongly_trained(model: nn.Module, record: Applied) -> Iterator[tuple[str, str]]:
    """Parameters that train although frozen, or are frozen although they should train, or are gone."""
    parameters, everywhere = dict(model.named_parameters()), dict(model.named_parameters(remove_duplicate=False))
    adapters = {f"{name}.adapters.{n}".lstrip(".") for name, _, a in adapted_layers(model) for n, _ in a.named_parameters()}
    for name, parameter in parameters.items():
        if parameter.requires_grad and name not in adapters and name not in record.selected:
            known = name in record.trained_before
            yield (
                name,
                f"would train, though {'apply froze it' if known else 'it was not there at apply'}: freeze it, or apply anew",
            )
        if not parameter.requires_grad and name in record.selected:
            yield name, "is frozen, though apply chose it to train: call requires_grad_(True) on it, or apply anew"
    for name in record.selected:
        if name not in everywhere:
            yield name, "was chosen by apply and is no longer there: was its layer replaced? Change the model first, then apply"
    modules = dict(model.named_modules())
    for method, site, _ in record.sites:
        layer = modules.get(site)
        adapter = None if layer is None else layer._modules.get("adapters")
        if adapter is None:
            yield site, f"has lost its adapter ({method}): was the layer replaced? Change the model first, then apply"
        elif not any(p.requires_grad for _, a in adapter.adapters() for _, p in parameters_of(a)):
            yield site, f"has an adapter ({method}) that is frozen: call requires_grad_(True) on it"


def _drifting(model: nn.Module, record: Applied) -> Iterator[tuple[str, str]]:
    """BatchNorms whose statistics training would change, though they are not to adapt."""
    twin = real_twin(model).train()
    for name, layer in with_statistics(twin):
        buffers = [f"{name}.{b}".lstrip(".") for b, _ in layer.named_buffers(recurse=False)]
        if layer.training and not set(buffers) <= set(record.statistics):
            hint = "convert (to SyncBatchNorm) first, then apply, or pass batchnorm='adapt'"
            yield name, f"({type(layer).__name__}) would change its frozen statistics in training: {hint}"


def _not_optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Trainable parameters that the optimizer lacks, and parameters that it holds in their place."""
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    own = {id(p) for p in model.parameters()}
    stale = [tuple(p.shape) for key, p in held.items() if key not in own]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in held:
            old = " (it holds a replaced one of the same shape)" if tuple(parameter.shape) in stale else ""
            yield name, f"is not in the optimizer{old}: build it after apply, from medpeft.parameter_groups(model, lr=…)"


def _grouped(reasons: dict[str, str]) -> dict[str, str]:
    """Names, joined, by reason."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        found.setdefault(reason, []).append(name)
    return {reason: ", ".join(names) for reason, names in found.items()}


def _message(model: nn.Module, problems: list[tuple[str, str]]) -> str:
    by_text: dict[str, list[str]] = {}
    for name, text in problems:
        by_text.setdefault(text, []).append(name or "the model")
    lines = [f"{', '.join(names)} {text}." for text, names in by_text.items()]
    return "\n  ".join([f"{type(model).__name__} failed the check; {len(problems)} findings:", *lines])
