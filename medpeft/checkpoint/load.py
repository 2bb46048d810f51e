"""Load a checkpoint: everything is checked before anything changes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.aside import Settled, put, recovered, restore
from ..adapters.batchnorm import statistics_names
from ..adapters.options import require_options
from ..adapters.record import (
    Adapted,
    Applied,
    adapted_inside,
    applied,
    own_tensors,
    require_applied,
    require_model,
    trained_tensors,
)
from ..adapters.running import switching
from ..architecture.layers import within
from ..architecture.network import Network
from ..errors import CheckpointError, MedpeftError
from ..sharding import is_sharded
from ..surgery.apply import carry_out
from ..surgery.build import build, state_of_built
from ..surgery.install import Built
from ..surgery.plan import Plan, plan_from
from .compatibility import (
    outside,
    require_base,
    require_fit,
    require_proportion,
    require_same_methods,
    require_values,
    saved_record,
)
from .fingerprint import class_of
from .head import draw_head
from .header import Header, read, read_values
from .messages import clip
from .source import Source, name_of, opened

HeadPolicy = Literal["strict", "skip", "reinit"]
"""What becomes of the head in a file: `load` says what each does."""


@dataclass(frozen=True)
class Prepared:
    """Plan of everything that loading a file does to a model.

    Attributes:
        header: The file's header.
        planned: The plan by which the model is adapted first, None if it is adapted already.
        built: The planned adapters.
        values: Tensors that are then copied into the model, by name.
    """

    header: Header
    planned: Plan | None
    built: list[Built]
    values: dict[str, Tensor]


def inspect(path: Source) -> Header:
    """Read the header of a checkpoint, without its tensors. Print it.

    Args:
        path: As for `load`.

    Raises:
        CheckpointError: there is no such file, or it is no checkpoint of medpeft's.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "lora", rank=2, target="0", head="1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     medpeft.save(model, f"{folder}/a.safetensors")
        ...     list(medpeft.inspect(f"{folder}/a.safetensors").tensors)
        ['0.adapters.lora.down', '0.adapters.lora.up', '1.bias', '1.weight']
    """
    with opened(path) as file:
        return read(file, name_of(path))


def load(
    model: nn.Module,
    path: Source,
    *,
    check_base: bool = True,
    head: HeadPolicy = "strict",
    keep_base: bool | None = None,
) -> nn.Module:
    """Load a checkpoint: onto the base it was trained on, or into a model adapted in the same way.

    A base is adapted as the file says. In a model with the same methods, options and sites the values are
    swapped in place: no parameter is replaced, so optimizers keep theirs and a compiled model stays compiled.

    Args:
        model: The base with its pretrained weights loaded, or a model after `apply` or `load`.
        path: A path, the file's bytes, or a file that is open for bytes.
        check_base: Raise where class, shapes or sampled values of the frozen weights are not those of the
            file's base, or where a dtype would lose digits. False loads wherever the shapes allow it.
        head: "strict" loads the head; for another task, "skip" keeps the model's and "reinit" draws it anew.
        keep_base: As in `apply`, for a model that is not adapted yet.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is damaged or does not fit, with what differs. The model is untouched.

    Examples:
        >>> import copy, tempfile, medpeft, torch
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> trained = medpeft.apply(copy.deepcopy(base), "lora", target="0", head="1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     medpeft.save(trained, f"{folder}/a.safetensors")
        ...     loaded = medpeft.load(base, f"{folder}/a.safetensors")
        >>> torch.equal(loaded[0].adapters.lora.down, trained[0].adapters.lora.down)
        True
    """
    require_model(model, path)
    arguments = {"head": head, "check_base": check_base, "keep_base": keep_base}
    require_options("", arguments, {"head": HeadPolicy, "check_base": bool, "keep_base": bool | None})
    with switching(model, "load"):
        with opened(path) as file:
            header = read(file, name_of(path))
            prepared = prepare(model, file, header, check_base=check_base, head=head, keep_base=keep_base)
        if prepared.planned is None:
            fill(model, require_applied(model), prepared.values)
        else:
            carry_out(prepared.planned, prepared.built, prepared.values)
    return model


def prepare(
    model: nn.Module,
    file: io.BufferedIOBase,
    header: Header,
    *,
    check_base: bool,
    head: HeadPolicy,
    keep_base: bool | None,
) -> Prepared:
    """Read and check everything that follows the header; the model stays as it is."""
    try:
        record = _record(model, header, head=head, keep_base=keep_base)
        skipped = _skipped(record, head)
        if check_base:
            require_base(header, model, record, skipped)
        planned = None
        if applied(model) is None:
            with _options_from_file(record):
                planned = plan_from(model, record)
        expected, exact = _expected(model, record, planned)
        names = require_fit(header, model, record, expected, exact if check_base else (), skipped)
        values = {name: value for name, value in read_values(file, header).items() if name in names}
        if head == "reinit":
            values |= draw_head(model, record)
        return Prepared(header, planned, built_for(planned, values), values)
    except CheckpointError:
        raise
    except MedpeftError as error:
        misfit = f"{header.name} does not fit this {class_of(model).__name__}"
        raise CheckpointError(f"{misfit}: {clip(error, 2000)}") from error


def fill(model: nn.Module, record: Applied, values: dict[str, Tensor]) -> None:
    """Copy the values into an adapted model; a call that is interrupted copies all or none."""

    def settle() -> None:
        restore(model, record)

    settled = Settled(settle)
    with settled, settled:
        put(model, record, "load", values)
        record.aside = None


def _skipped(record: Applied, head: HeadPolicy) -> tuple[str, ...]:
    """Return the names of the modules that are not loaded."""
    if head == "strict":
        return ()
    return record.head


def _record(model: nn.Module, header: Header, *, head: HeadPolicy, keep_base: bool | None) -> Applied:
    """Return the record of the adapted model, or the one that loading the file leaves on its base."""
    require_values(model)
    if applied(model) is not None:
        adapted = recovered(model, "load")
        if not adapted.acting:
            raise CheckpointError("Leave medpeft.disabled, scaled or merged before loading.")
        require_same_methods(header, model, adapted.record, _skipped(adapted.record, head))
        return adapted.record
    inside = adapted_inside(model)
    if inside is not None:
        raise CheckpointError(
            f"The {type(model).__name__} only wraps the adapted model: load into its {inside!r}."
        )
    for name, tensor in own_tensors(model):
        if is_sharded(tensor):
            raise CheckpointError(f"{name!r} is sharded already: load the checkpoint before fully_shard.")
    return _new_record(model, header, head=head, keep_base=keep_base)


def _new_record(model: nn.Module, header: Header, *, head: HeadPolicy, keep_base: bool | None) -> Applied:
    """Complete the record in the file by facts about this model."""
    record = saved_record(header)
    skipped = _skipped(record, head)
    record.selected = outside(record.selected, skipped)
    for name, parameter in model.named_parameters():
        record.trained_before[name] = parameter.requires_grad
        if within(name, skipped):
            record.selected[name] = "head"
    present = dict(model.named_modules())
    record.head = tuple(name for name in record.head if name in present)
    record.statistics = []
    if record.batchnorm == "adapt":
        record.statistics = statistics_names(Network(model, record.head, record.depth))
    if keep_base is False or (keep_base is None and "full" in record.methods):
        record.base = None
    return record


def _expected(
    model: nn.Module, record: Applied, planned: Plan | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors of a file for the model, and those of them that have their dtype already."""
    if planned is None:
        saved = Adapted.of(model).saved
        return saved, saved
    trained = dict(trained_tensors(model, record))
    # Only shapes, because the options in an unchecked file may ask for any size.
    with _options_from_file(record):
        built = build(model, planned.sites, record, shapes_only=True)
    require_proportion(model, built)
    shapes = dict(state_of_built(built))
    return {**trained, **shapes}, trained


def built_for(planned: Plan | None, values: dict[str, Tensor]) -> list[Built]:
    """Build the planned adapters, each in the dtype in which the file holds it."""
    if planned is None:
        return []
    with _options_from_file(planned.record):
        built = build(planned.model, planned.sites, planned.record, from_file=True)
    for item in built:
        dtype = _saved_dtype(item, values)
        for module in (item.adapter, *item.adapter.shared.values()):
            module.to(dtype=dtype)
    return built


def _saved_dtype(item: Built, values: dict[str, Tensor]) -> torch.dtype | None:
    """Return the dtype in which the file holds an adapter, None if it holds nothing of its own."""
    for name, _ in state_of_built([item]):
        if name in values and values[name].is_floating_point():  # A shared tensor is there once.
            return values[name].dtype
    return None


@contextmanager
def _options_from_file(record: Applied) -> Iterator[None]:
    """Name the options where a method fails: from a file it may get any type and number."""
    try:
        yield
    except MedpeftError:
        raise
    except Exception as error:
        options = clip(record.methods)
        reason = f"No adapter can be made with the options in the file, {options}: {clip(error)}"
        raise CheckpointError(reason) from error
