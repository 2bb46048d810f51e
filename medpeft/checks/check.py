"""The proof that every trainable tensor has an effect: by its path to the output, then by its gradient.

Everything is tried on copies of the model. `medpeft.checks.connections.connected` is the first part alone,
for models without values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any

import torch
from torch import nn

from ..adapters.aside import recovered
from ..adapters.presence import lost_modules
from ..adapters.record import Adapted
from ..adapters.samples import changes_since_apply
from ..adapters.wiring import branches_of
from ..architecture.layers import within
from ..architecture.network import Network
from ..errors import MedpeftError
from .connections import WithoutEffect, connected
from .copies import trainable, undisturbed
from .effects import effects
from .since_apply import Finding, findings_since_apply, notes_since_apply, statistics


@dataclass
class Checked:
    """The result of `check`. Print it.

    Attributes:
        tensors: Number of trainable tensors that act in train and in eval mode.
        parameters: Number of their elements.
        exempt: Names of trainable tensors that do not act, harmlessly, with the reason.
        notes: Sentences on tensors whose effect could not be shown, and other remarks.

    Examples:
        >>> import torch, medpeft
        >>> model = medpeft.apply(torch.nn.Sequential(torch.nn.Linear(4, 2)), "full", head=None)
        >>> checked = medpeft.check(model, torch.randn(3, 4))
        >>> checked.tensors, checked.parameters, checked.exempt
        (2, 10, {})
    """

    tensors: int
    parameters: int
    exempt: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        size = f"{self.tensors} trainable tensors ({self.parameters:,} parameters)"
        lines = [f"{size} act in train and in eval mode"]
        names_by_reason = _grouped(starmap(Finding, self.exempt.items()))
        for reason, names in list(names_by_reason.items())[:6]:
            lines.append(f"exempt: {', '.join(names)}: {reason}")
        if len(names_by_reason) > 6:
            lines.append(f"… and {len(names_by_reason) - 6} more kinds of exemption")
        lines += [f"note: {note}" for note in self.notes]
        return "\n  ".join(lines)


def check(model: nn.Module, example_input: Any, *, optimizer: torch.optim.Optimizer | None = None) -> Checked:
    """Prove that every trainable tensor of an adapted model acts on its output, in train and in eval mode.

    The model is not touched: everything runs on copies that share its frozen weights. Random states are
    restored, and the caller may have switched gradients off.

    Args:
        model: A model after `apply`, not yet compiled, sharded or wrapped. On the meta device, only
            connections are checked.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs, on the model's device. In
            train mode a BatchNorm may need more than one image.
        optimizer: An optimizer, to check that it holds every trainable parameter and no replaced one.

    Returns:
        How much acts, and what is exempt because it acts in no model, as a key's bias under a softmax.

    Raises:
        MedpeftError: a tensor cannot act, training would change what is frozen, a forward is lost, or the
            optimizer holds other parameters; all are named, with the reason if it is known. Or the model does
            not run on the input.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "ssf", head="2")
        >>> print(medpeft.check(model, torch.randn(3, 4)))
        4 trainable tensors (34 parameters) act in train and in eval mode
    """
    adapted = recovered(model, "check")
    changes = changes_since_apply(model, adapted.record) if adapted.acting else {}
    findings = findings_since_apply(adapted, changes, optimizer)
    if findings and lost_modules(model, branches_of(model)):  # It would not run.
        raise MedpeftError(_message(model, findings))
    without_effect, notes = _without_effect(model, example_input)
    notes += notes_since_apply(changes)
    exempt = _exempt(adapted, without_effect)
    findings += _cannot_act(without_effect, exempt)
    if findings:
        raise MedpeftError(_message(model, findings))
    acting = [parameter for name, parameter in trainable(model).items() if name not in exempt]
    return Checked(len(acting), sum(parameter.numel() for parameter in acting), exempt, notes)


def _without_effect(model: nn.Module, example: Any) -> tuple[list[WithoutEffect], list[str]]:
    """Find the trainable tensors without effect, and make notes on the model."""
    without, notes = [], []
    is_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    try:
        without = connected(model, example).without_effect
    except MedpeftError as reason:
        if is_meta:
            raise
        notes.append(f"real values alone were checked: {reason}")
    if is_meta:
        return without, ["the model has no values (meta device): connections alone were checked"]
    connected_names = trainable(model)
    for tensor in without:
        del connected_names[tensor.name]
    with undisturbed():
        more, changed_buffers = effects(model, example, list(connected_names))
    adapting = statistics(model)
    for name in changed_buffers:
        if name in adapting:
            continue
        notes.append(f"{name}, a buffer, changes in training and is not saved")
    return without + more, notes


def _cannot_act(without_effect: list[WithoutEffect], exempt: dict[str, str]) -> Iterator[Finding]:
    """Find the tensors without effect that no reason exempts."""
    for tensor in without_effect:
        if tensor.name not in exempt:
            modes = " and ".join(tensor.modes)
            yield Finding(tensor.name, f"cannot act in {modes} mode: {tensor.reason}")


def _exempt(adapted: Adapted, without_effect: list[WithoutEffect]) -> dict[str, str]:
    """Reasons of the tensors without effect that do no harm, by name."""
    network = Network(adapted.model, adapted.record.head)
    exempt = {}
    for tensor in without_effect:
        reason = _exemption(network, adapted.record.selected.get(tensor.name, ""), tensor)
        if reason:
            exempt[tensor.name] = reason
    return exempt


def _exemption(network: Network, selected_by: str, tensor: WithoutEffect) -> str:
    """Say why a tensor without effect does no harm, or "" if it does."""
    if selected_by == "head" and tensor.modes == ("eval",):
        return "an auxiliary head, which serves in training alone"
    name = tensor.name.replace(".adapters.ssf.shift", ".bias").replace(".adapters.lora.bias", ".bias")
    layer, _, last = name.rpartition(".")
    if last == "bias" and _is_cancelled_by_softmax(network, layer):
        return "the softmax of the attention cancels what is added to every key, or to every score"
    is_mere_shift = last == "bias" and (selected_by or tensor.name.endswith(".adapters.ssf.shift"))
    if is_mere_shift and "normalises it away" in tensor.reason:
        return tensor.reason.partition(";")[0]
    return ""


def _is_cancelled_by_softmax(network: Network, layer: str) -> bool:
    """Whether a layer makes keys alone, or lies in an attention and projects nothing, as a position MLP."""
    for core, projections in network.attentions.items():
        for projection in projections:
            if layer == projection.layer_in(core):
                return projection.parts == "k"
        if within(layer, [core]):
            return True
    return False


def _grouped(findings: Iterable[Finding]) -> dict[str, list[str]]:
    """Names by text."""
    groups: dict[str, list[str]] = {}
    for finding in findings:
        groups.setdefault(finding.text, []).append(finding.name or "the model")
    return groups


def _message(model: nn.Module, findings: list[Finding]) -> str:
    lines = [f"{type(model).__name__} failed the check; {len(findings)} findings:"]
    for text, names in _grouped(findings).items():
        lines.append(f"{', '.join(names)} {text}.")
    return "\n  ".join(lines)
