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

from ..adapters.adapter import Adapters, parameters_of
from ..adapters.batchnorm import with_statistics
from ..adapters.record import Adapted
from ..adapters.samples import GONE, OTHER_VALUES, changes_since_apply, is_statistic, made_of_other_weights
from ..adapters.wiring import is_wired
from ..architecture.network import Network
from ..errors import MedpeftError, listed
from .connections import WithoutEffect, connected
from .copies import copied, trainable, undisturbed
from .effects import effects


@dataclass
class Checked:
    """The result of `check`. Print it.

    Attributes:
        tensors: Number of trainable tensors that act in train and in eval mode.
        parameters: Number of their elements.
        exempt: Names of trainable tensors that do not act, harmlessly, with the reason.
        notes: What could not be shown, and what else is worth knowing.

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


@dataclass(frozen=True)
class Finding:
    """Something to say of the layer or tensor of this name."""

    name: str
    text: str


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
    adapted = Adapted.of(model)
    changes = changes_since_apply(model, adapted.record) if adapted.acting else {}
    findings = _since_apply(adapted, changes, optimizer)
    without_effect, notes = _without_effect(model, example_input)
    notes += _changed_weights(changes)
    exempt = _exempt(adapted, without_effect)
    for tensor in without_effect:
        if tensor.name not in exempt:
            modes = " and ".join(tensor.modes)
            findings.append(Finding(tensor.name, f"cannot act in {modes} mode: {tensor.reason}"))
    if findings:
        raise MedpeftError(_message(model, findings))
    acting = [parameter for name, parameter in trainable(model).items() if name not in exempt]
    return Checked(len(acting), sum(parameter.numel() for parameter in acting), exempt, notes)


def _since_apply(
    adapted: Adapted, changes: dict[str, str], optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    """Find what became of the model since `apply`."""
    findings = list(_lost_forwards(adapted))
    findings += _misplaced_gradients(adapted)
    findings += _replaced_layers(adapted)
    findings += _changing_statistics(adapted)
    findings += _changed_base(adapted, changes)
    if optimizer is not None:
        findings += _missing_in_optimizer(adapted.model, optimizer)
    return findings


def _without_effect(model: nn.Module, example: Any) -> tuple[list[WithoutEffect], list[str]]:
    """Find the trainable tensors without effect, and what is worth a note."""
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
    adapting = _statistics(model)
    for name in changed_buffers:
        if name in adapting:
            continue
        notes.append(f"{name}, a buffer, changes in training and is not saved")
    return without + more, notes


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
    layer, _, last = tensor.name.replace(".adapters.ssf.shift", ".bias").rpartition(".")
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
            if layer == f"{core}.{projection.path}".strip("."):
                return projection.parts == "k"
        if network.inside(layer, [core]):
            return True
    return False


def _misplaced_gradients(adapted: Adapted) -> Iterator[Finding]:
    """Find parameters that train although frozen, or are frozen although they should train, or are gone."""
    selected, trained_before = adapted.record.selected, adapted.record.trained_before
    # By identity: a file names what adapters share by the first of them, the model by where it is registered.
    own = {id(tensor) for tensor in adapted.own.values()}
    for name, parameter in adapted.model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own and name not in selected:
            reason = "it was not there at apply"
            if name in trained_before:
                reason = "apply froze it"
            yield Finding(name, f"would train, though {reason}: freeze it, or apply anew")
        if not parameter.requires_grad and name in selected:
            hint = "call requires_grad_(True) on it, or apply anew"
            yield Finding(name, f"is frozen, though apply chose it to train: {hint}")
        if not parameter.requires_grad and parameter.grad is not None:
            hint = "set its grad to None, or an optimizer over model.parameters() moves it"
            yield Finding(name, f"is frozen, but has a gradient from before: {hint}")
    names = dict(adapted.model.named_parameters(remove_duplicate=False))
    for name in selected:
        if name not in names:
            hint = "was its layer replaced? Change the model first, then apply"
            yield Finding(name, f"was chosen by apply and is no longer there: {hint}")


def _replaced_layers(adapted: Adapted) -> Iterator[Finding]:
    """Find layers whose adapters are gone or frozen."""
    adapters = {name: adapters for name, _, adapters in adapted.layers}
    for method, layer, _ in adapted.record.sites:
        if layer not in adapters:
            hint = "was the layer replaced? Change the model first, then apply"
            yield Finding(layer, f"has lost its adapter ({method}): {hint}")
        elif not _trains(adapters[layer]):
            yield Finding(layer, f"has an adapter ({method}) that is frozen: call requires_grad_(True) on it")


def _trains(adapters: Adapters) -> bool:
    """Whether any parameter of a layer's adapters trains."""
    for _, adapter in adapters.adapters():
        for _, parameter in parameters_of(adapter):
            if parameter.requires_grad:
                return True
    return False


def _changed_base(adapted: Adapted, changes: dict[str, str]) -> Iterator[Finding]:
    """Find what cannot go on with a base that has changed since `apply`."""
    for name, change in changes.items():
        if change == GONE:
            hint = "was its layer re-parameterised or replaced? Change the model first, then apply"
            yield Finding(name, f"{change}: {hint}")
        elif all(map(is_statistic, changes)):
            hint = "frozen statistics must not be reset or estimated anew; load them again, or apply anew"
            yield Finding(name, f"{change}: {hint}")
    for layer, method in made_of_other_weights(adapted, changes).items():
        reason = f"has other weights than those that {method!r} took apart at apply"
        yield Finding(layer, f"{reason}: load weights first, then apply")


def _changed_weights(changes: dict[str, str]) -> list[str]:
    """Write the note that the base is another one than at `apply`."""
    names = [name for name, change in changes.items() if change == OTHER_VALUES]
    if not names:
        return []
    effect = "the model trains beside them and is saved for them, but disabled and remove cannot give a base"
    return [f"{listed(names, most=1)} {OTHER_VALUES}: {effect}"]


def _lost_forwards(adapted: Adapted) -> Iterator[Finding]:
    """Find layers whose adapters are not brought in, by their own forward or by that of a module that reads their weight."""
    network = Network(adapted.model, adapted.record.head)
    hint = "was the layer converted, or its forward deleted?"
    for name, layer, adapters in adapted.layers:
        wired = [layer] if any(True for _ in adapters.adapters()) else []
        if adapters.on_weight:
            wired += [network.modules[reader.name] for reader in network.readers(layer, *layer._parameters)]
        if not all(map(is_wired, wired)):
            yield Finding(name, f"has lost the forward of its adapters ({hint}); convert first, then apply")
        if not adapters.enabled:
            yield Finding(
                name, "has its adapters switched off; leave `with medpeft.disabled(…)` or `merged(…)` first"
            )


def _changing_statistics(adapted: Adapted) -> Iterator[Finding]:
    """Find BatchNorms whose statistics training would change, though they are not to adapt."""
    training = copied(adapted.model, share_frozen=True).train()
    for name, layer in with_statistics(training):
        if layer.training and not _statistics(layer, name) <= set(adapted.record.statistics):
            hint = "convert (to SyncBatchNorm) first, then apply, or pass batchnorm='adapt'"
            kind = type(layer).__name__
            yield Finding(name, f"({kind}) would change its frozen statistics in training: {hint}")


def _statistics(model: nn.Module, prefix: str = "") -> set[str]:
    """Names of the buffers of all BatchNorms."""
    names = set()
    for name, layer in with_statistics(model):
        for buffer, _ in layer.named_buffers(f"{prefix}.{name}".strip("."), recurse=False):
            names.add(buffer)
    return names


def _missing_in_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Finding]:
    """Find trainable parameters that the optimizer lacks, and tell where it holds a replaced one."""
    ids = set(map(id, model.parameters()))
    held, replaced_shapes = set(), set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held.add(id(parameter))
            if id(parameter) not in ids:
                replaced_shapes.add(parameter.shape)
    for name, parameter in trainable(model).items():
        if id(parameter) not in held:
            replaced = ""
            if parameter.shape in replaced_shapes:
                replaced = " (it holds a replaced one of the same shape)"
            hint = "build it after apply, from medpeft.parameter_groups(model, lr=…)"
            yield Finding(name, f"is not in the optimizer{replaced}: {hint}")


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
