"""Put another adapter of a bank into the model: written over the one there, or installed in its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..adapters.adapters import Adapters
from ..adapters.aside import Settled, restore
from ..adapters.record import Adapted, Applied, Aside, applied
from ..architecture.caches import empty_caches
from ..errors import MedpeftError, listed
from ..surgery.apply import carry_out, make_plain
from ..surgery.install import Built
from ..surgery.plan import Plan
from ..surgery.refusals import refuse
from .base import Base
from .entry import BankEntry


@dataclass
class Installed:
    """The adapter that a bank has put into the model.

    Attributes:
        entry: The adapter.
        record: The record that is on the model for as long as this holds.
        tensors: The model's tensors that hold the adapter, by name.
    """

    entry: BankEntry
    record: Applied
    tensors: dict[str, Tensor]

    @property
    def name(self) -> str:
        """Name of the adapter."""
        return self.entry.name

    def require_present(self, model: nn.Module) -> None:
        """Raise `MedpeftError` if an adapter or a tensor that was installed is no longer in the model."""
        kind = self.entry.kind
        for item in kind.built:
            if not _is_present(item, model):
                raise _lost(item.site.name, self.name)
        for name in (*kind.record.selected, *kind.record.statistics):
            path, _, key = name.rpartition(".")
            owner = _module(model, path)
            tensor = self.tensors[name]
            if owner is None or owner._parameters.get(key, owner._buffers.get(key)) is not tensor:
                raise _lost(name, self.name)

    def changed_since_installed(self) -> list[str]:
        """List the tensors that hold other values than the adapter in the bank."""
        return self.differing_from(self.entry)

    def differing_from(self, entry: BankEntry) -> list[str]:
        """List the tensors that hold other values than an adapter of the same kind in the bank."""
        differing = []
        for name, tensor in self.tensors.items():
            if not torch.equal(tensor, entry.values[name]):
                differing.append(name)
        return differing

    def trained_error(self, changed: list[str]) -> MedpeftError:
        """Make the error for an adapter whose tensors have changed."""
        return MedpeftError(
            f"The model was trained since use({self.name!r}): {listed(changed, most=1)} has other values "
            "than in the bank. Add them under another name, or pass discard=True."
        )

    def present_values(self, changed: Iterable[str]) -> dict[str, Tensor]:
        """Return what the tensors hold: copies of those in `changed`, and else the bank's own tensors.

        `changed` must name every tensor that has other values than the adapter in the bank.
        """
        values = dict(self.entry.values)
        for name in changed:
            values[name] = self.tensors[name].detach().clone()
        return values


def _is_present(item: Built, model: nn.Module) -> bool:
    """Whether an adapter is at its site."""
    layer = _module(model, item.site.name)
    if layer is None:
        return False
    adapters = layer._modules.get("adapters")
    return isinstance(adapters, Adapters) and item.adapter in adapters._modules.values()


def _module(model: nn.Module, path: str) -> nn.Module | None:
    """Find a module by its name, None if it is not there."""
    module: nn.Module | None = model
    for name in filter(None, path.split(".")):
        if module is None:
            return None
        module = module._modules.get(name)
    return module


def _lost(name: str, adapter: str) -> MedpeftError:
    return MedpeftError(
        f"{name!r} is not what the bank put {adapter!r} into: was a layer or the head replaced? Put the old "
        "one back, or make a new bank."
    )


class InModel:
    """What a bank has in the model at the moment.

    Whoever changes it has seen to it that no other thread runs the model.

    Attributes:
        installed: The adapter, None for the base.
    """

    def __init__(self, base: Base) -> None:
        self._base = base
        self.installed: Installed | None = None

    def recognise(self, entry: BankEntry) -> None:
        """Count an adapter that was just added as the installed one, if what was trained has its values."""
        installed = self.installed
        if installed is None or installed.entry.kind is not entry.kind:
            return
        if installed.changed_since_installed() and not installed.differing_from(entry):
            installed.entry = entry

    def switch_to(self, entry: BankEntry | None, changed: Iterable[str] = ()) -> None:
        """Make the model compute with an adapter, or with None as the base.

        If it raises, the model has the adapter that it had, or the new one, never a part of each; and
        `installed` says which.

        Args:
            entry: The adapter.
            changed: Names of all tensors that hold other values than the installed adapter in the bank. One
                left out gets the bank's value if the switch fails.
        """
        old = self.installed
        if old is None:
            self._exchange(None, {}, entry)
        elif entry is None or not _fits(old.entry, entry):
            self._exchange(old, old.present_values(changed), entry)
        else:
            self._write_over(old, old.present_values(changed), entry)

    def _write_over(self, installed: Installed, old_values: dict[str, Tensor], entry: BankEntry) -> None:
        """Write the values of an adapter into the tensors that hold another one of its kind."""
        model, record = self._base.model, installed.record
        is_written = False

        def settle() -> None:
            if is_written:
                record.aside = None
                installed.entry = entry
            else:
                restore(model, record)  # Without `aside` nothing was written, and it does nothing.

        # `settle` runs at the end of the block, and once more if an interrupt cut the first time short.
        settled = Settled(settle)
        with settled, settled, torch.no_grad():
            record.aside = Aside("use", old_values)
            for name, tensor in installed.tensors.items():
                tensor.copy_(entry.values[name])
            empty_caches(model)
            is_written = True

    def _exchange(
        self, old: Installed | None, old_values: dict[str, Tensor], entry: BankEntry | None
    ) -> None:
        """Take the adapter in the model out, and install another one."""
        base, model = self._base, self._base.model
        new_record = _record_for(base, entry)

        def settle() -> None:
            if applied(model) is None and old is not None and entry is not None:
                # The old one is out, and the other did not come in.
                _install(base, old.entry, old.record, old_values)
            # Note what is on the model now: nothing, the new adapter or the old one.
            on_model = applied(model)
            if on_model is None:
                self.installed = None
            elif entry is not None and on_model is new_record:
                self.installed = _locate(model, entry, on_model)
            elif old is not None and on_model is old.record:
                self.installed = _locate(model, old.entry, on_model)

        settled = Settled(settle)
        with settled, settled:
            if old is not None:
                take_out(base, old.record)
            if entry is not None and new_record is not None:  # Both are None for the base.
                refuse(model)  # Not earlier: it refuses an adapted model.
                _install(base, entry, new_record, entry.values)
        # The tensors of the old kind are out of use: they are cleared, for the adapter may be withdrawn. Only
        # after `settled`, which may put the old one back into them.
        if old is not None and (entry is None or entry.kind is not old.entry.kind):
            old.entry.kind.clear()


def _fits(before: BankEntry, entry: BankEntry) -> bool:
    """Whether an adapter fits into the tensors of another one."""
    return before.kind is entry.kind and before.head_shapes() == entry.head_shapes()


def _locate(model: nn.Module, entry: BankEntry, record: Applied) -> Installed:
    """Find the tensors that hold an adapter in the model."""
    return Installed(entry, record, dict(Adapted.of(model).saved))


def _record_for(base: Base, entry: BankEntry | None) -> Applied | None:
    """Make the record that an adapter leaves on the model, None for the base.

    `carry_out` fills in the base's values and samples.
    """
    if entry is None:
        return None
    return replace(entry.kind.record, base={}, samples={}, trained_before=dict(base.trained_before))


def _install(base: Base, entry: BankEntry, record: Applied, adapter_values: Mapping[str, Tensor]) -> None:
    """Install an adapter, with its values or others, in the model, which has none."""
    model = base.model
    present = dict(model.named_parameters())
    values: dict[str, Tensor] = {}
    for name, value in adapter_values.items():
        if name in present and present[name].shape != value.shape:  # A head with another number of classes.
            value = nn.Parameter(value.clone())
        values[name] = value
    # `carry_out` reads its model and record alone, for the adapters are built.
    planned = Plan(model, methods=[], sites=[], selected=record.selected, record=record)
    carry_out(planned, entry.kind.built_for(model), values)


def take_out(base: Base, record: Applied) -> None:
    """Take the adapters that a record describes out of the model, which is the base then."""

    def values(adapted: Adapted) -> dict[str, Tensor]:
        return base.values((*record.selected, *record.statistics), adapted.trained)

    make_plain(base.model, "use", values)
