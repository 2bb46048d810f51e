"""One adapter of a bank: its tensors, read and checked before anything changes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.record import Adapted
from ..checkpoint.compatibility import OtherBaseError, saved_record
from ..checkpoint.header import Header, content_digest, read
from ..checkpoint.load import Prepared, prepare
from ..checkpoint.save import save
from ..checkpoint.source import Source, name_of, opened
from ..checkpoint.state import Array, checked
from ..errors import CheckpointError, MedpeftError, clipped, did_you_mean, listed
from ..table import Table
from .base import Base, requiring
from .heads import Shapes, zeros_for_head
from .kind import Kind, key_of
from .mirror import Mirror


@dataclass(frozen=True)
class BankEntry:
    """An adapter of a bank.

    Attributes:
        name: Its name.
        kind: Its kind.
        values: Its tensors by the names of a file, in their own dtype, on the model's device.
        metadata: What was saved with it; names of the classes under "classes".
        digest: Digest of names, dtypes, shapes and bytes of its tensors.
    """

    name: str
    kind: Kind
    values: dict[str, Tensor]
    metadata: dict[str, Any]
    digest: str

    @property
    def methods(self) -> str:
        """Its methods as one name."""
        return self.kind.record.name

    @property
    def classes(self) -> str:
        """Names of its classes, in one line."""
        return ", ".join(self.metadata.get("classes") or [])

    @property
    def parameters(self) -> int:
        """Number of elements of all its tensors."""
        return sum(value.numel() for value in self.values.values())

    @property
    def bytes(self) -> int:
        """Memory that its tensors take."""
        return sum(value.nbytes for value in self.values.values())

    def head_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors that may differ between adapters of a kind."""
        return tuple(tuple(self.values[name].shape) for name in self.kind.heads)


class Entries(dict[str, BankEntry]):
    """The adapters of a bank by name."""

    def named(self, name: object) -> BankEntry:
        """Return the adapter of a name, or raise `MedpeftError`."""
        entry = self.get(name) if isinstance(name, str) else None
        if entry is None:
            near = did_you_mean(str(name), tuple(self))
            raise MedpeftError(f"No adapter {clipped(name)} is in the bank.{near} It has {listed(self)}.")
        return entry

    def kinds(self) -> dict[str, Kind]:
        """Return the kinds of all adapters, by key."""
        return {entry.kind.key: entry.kind for entry in dict(self).values()}


def read_entry(
    base: Base, kinds: Mapping[str, Kind], name: str, source: Source, metadata: Mapping[str, Any] | None
) -> BankEntry:
    """Read a file.

    Raises:
        CheckpointError: it is damaged, of another base, has another head, or values that are not finite.
    """
    with opened(source) as file:
        header = read(file, name_of(source))
        kind, values = _kind_and_values(base, kinds, file, header)
    for tensor_name, value in values.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{tensor_name!r} in {header.name} has values that are not finite.")
    if metadata is None:
        metadata = header.metadata
    return _entry(name, kind, values, metadata)


def _kind_and_values(
    base: Base, kinds: Mapping[str, Kind], file: io.BufferedIOBase, header: Header
) -> tuple[Kind, dict[str, Tensor]]:
    """Find or make the kind of the adapter in a file, and read its tensors.

    Raises:
        CheckpointError: it does not fit the base.
    """
    record = saved_record(header)
    shapes, dtypes = {}, {}
    for tensor_name, entry in header.tensors.items():
        shapes[tensor_name], dtypes[tensor_name] = entry.shape, entry.dtype
    zeros = zeros_for_head(base, record, shapes, header.name)
    key = key_of(record, dtypes)
    kind, prepared = kinds.get(key), None
    if kind is not None and kind.may_keep_other(record):
        prepared = _prepared(base.view(record.selected, zeros), file, header)
        kind.of_seed = not kind.keeps_same(prepared.built)
        if kind.of_seed:
            key = f"{key}, seed {record.seed}"
            kind = kinds.get(key)
    if kind is None:
        if prepared is None:
            prepared = _prepared(base.view(record.selected, zeros), file, header)
        kind = Kind.of(base, key, prepared)
    elif prepared is None:
        prepared = _prepared(_view_of(kind, base, zeros), file, header)
    return kind, prepared.values


def _prepared(view: nn.Module, file: io.BufferedIOBase, header: Header) -> Prepared:
    """Read and check a file for a view of the base.

    Raises:
        CheckpointError: it does not fit.
    """
    try:
        return prepare(view, file, header, check_base=True, head="strict", keep_base=True)
    except OtherBaseError as error:
        raise CheckpointError(
            f"{error.found}\nA bank has adapters of one base alone: make another bank of the base of these."
        ) from None


def entry_of_model(
    base: Base, kinds: Mapping[str, Kind], name: str, metadata: Mapping[str, Any] | None
) -> BankEntry:
    """Save the adapters in the model and read them back, so that they pass every check of a file.

    Raises:
        MedpeftError: the model has none, or they cannot be saved.
    """
    file = io.BytesIO()
    save(base.model, file, metadata)
    return read_entry(base, kinds, name, file, metadata)


def entry_of_state(
    base: Base, kind: Kind, name: str, state: Mapping[str, Tensor | Array], metadata: Mapping[str, Any] | None
) -> BankEntry:
    """Take a state, of an adapter of a known kind.

    Raises:
        CheckpointError: names, shapes or kinds of numbers are not the kind's, or a value is not finite.
    """
    shapes: Shapes = {}
    for key in kind.heads:
        value: Any = state.get(key)
        if isinstance(value, (Tensor, np.ndarray)):
            shapes[key] = tuple(value.shape)
    zeros = zeros_for_head(base, kind.record, shapes, f"The state of {name!r}")
    values = checked(Adapted.of(_view_of(kind, base, zeros)), state)
    return _entry(name, kind, values, metadata or {})


def _view_of(kind: Kind, base: Base, zeros: Mapping[str, Tensor]) -> nn.Module:
    """Mirror a model that is adapted as a kind, with the head's shapes as those of one of its adapters."""
    heads = {name: zeros.get(name, base.own(name)) for name in kind.heads}
    tensors = kind.replaced(base, heads)
    return Mirror(tensors).of(kind.adapted_mirror)


def _entry(name: str, kind: Kind, values: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> BankEntry:
    """Make an entry of checked tensors, which share no memory with others."""
    own = {}
    for tensor_name, value in values.items():
        model_has = kind.tensors[tensor_name]
        own[tensor_name] = requiring(value.detach().to(model_has, copy=True), model_has.requires_grad)
    return BankEntry(name, kind, own, dict(metadata), content_digest(own))


def table_of(entries: Sequence[BankEntry], title: str) -> Table:
    """Lay out adapters, one in a row."""
    total = sum(entry.bytes for entry in entries)
    columns = ("name", "methods", "classes", "parameters", "bytes")
    return Table(title, entries, columns, [f"{total:,} bytes together"], summed=False)
