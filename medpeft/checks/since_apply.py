"""What became of an adapted model since `apply`: what would train or is lost, and a base that has changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..adapters.adapter import parameters_of
from ..adapters.adapters import Adapters
from ..adapters.batchnorm import with_statistics
from ..adapters.record import Adapted
from ..adapters.samples import GONE, OTHER_VALUES, changed_statistics, made_of_other_weights
from ..adapters.wiring import is_wired
from ..architecture.network import Network
from ..errors import clipped, listed, require
from .copies import copied, trainable


@dataclass(frozen=True)
class Finding:
    """Something to say of the layer or tensor of this name."""

    name: str
    text: str


def findings_since_apply(
    adapted: Adapted, changes: dict[str, str], optimizer: torch.optim.Optimizer | None
) -> list[Finding]:
    """Find what became of the model since `apply`."""
    _require_optimizer(optimizer)
    findings = list(_lost_forwards(adapted))
    findings += _misplaced_gradients(adapted)
    findings += _replaced_layers(adapted)
    findings += _changing_statistics(adapted)
    findings += _changed_base(adapted, changes)
    if optimizer is not None:
        findings += _missing_in_optimizer(adapted.model, optimizer)
    return findings


def _require_optimizer(optimizer: object) -> None:
    """Raise `MedpeftError` unless it is an optimizer or None."""
    is_optimizer = hasattr(optimizer, "param_groups") and not isinstance(optimizer, type)
    message = f"optimizer={clipped(optimizer)} is no optimizer: pass the one that you made."
    require(optimizer is None or is_optimizer, message)


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
    for name in changed_statistics(changes):
        hint = "frozen statistics must not be reset or estimated anew; load them again, or apply anew"
        yield Finding(name, f"{OTHER_VALUES}: {hint}")
    for layer, method in made_of_other_weights(adapted, changes).items():
        reason = f"has other weights than those that {method!r} took apart at apply"
        yield Finding(layer, f"{reason}: load weights first, then apply")


def notes_since_apply(changes: dict[str, str]) -> list[str]:
    """Write the note that the base is another one than at `apply`."""
    names = [name for name, change in changes.items() if change == OTHER_VALUES]
    if not names:
        return []
    effect = "the model trains beside them and is saved for them, but disabled and remove cannot give a base"
    return [f"{listed(names, most=1)} {OTHER_VALUES}: {effect}"]


def _lost_forwards(adapted: Adapted) -> Iterator[Finding]:
    """Find layers whose adapters no forward brings in: theirs, or that of a reader of their weight."""
    network = Network(adapted.model, adapted.record.head)
    hint = "was the layer converted, or its forward deleted?"
    for name, layer, adapters in adapted.layers:
        wired = [layer] if any(True for _ in adapters.adapters()) else []
        if adapters.order.on_weight:
            wired += [network.modules[reader.name] for reader in network.readers(layer, *layer._parameters)]
        if not all(map(is_wired, wired)):
            yield Finding(name, f"has lost the forward of its adapters ({hint}); convert first, then apply")
        if not adapters.enabled:
            yield Finding(
                name, "has its adapters switched off; leave `with medpeft.disabled(…)` or `merged(…)` first"
            )
        elif adapters.strength != 1:
            yield Finding(name, "has its adapters scaled; leave `with medpeft.scaled(…)` first")


def _changing_statistics(adapted: Adapted) -> Iterator[Finding]:
    """Find BatchNorms whose statistics training would change, though they are not to adapt."""
    training = copied(adapted.model, share_frozen=True).train()
    for name, layer in with_statistics(training):
        if layer.training and not statistics(layer, name) <= set(adapted.record.statistics):
            hint = "convert (to SyncBatchNorm) first, then apply, or pass batchnorm='adapt'"
            kind = type(layer).__name__
            yield Finding(name, f"({kind}) would change its frozen statistics in training: {hint}")


def statistics(model: nn.Module, prefix: str = "") -> set[str]:
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
