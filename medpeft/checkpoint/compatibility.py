"""Does a checkpoint fit a model? Both are described by name in one form, and each difference is a line."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.record import Adapted, Applied, own_state, own_tensors
from ..adapters.registry import find
from ..architecture.layers import within
from ..errors import CheckpointError, MedpeftError, listed
from ..surgery.install import Built
from .file import short
from .fingerprint import class_of, identify, label
from .header import Header
from .messages import as_lines, clip

Described = TypeVar("Described")

_ALWAYS_ALLOWED = 2**22
"""Numbers beside those of the file that adapters of the smallest model may have: 16 MiB."""


@dataclass(frozen=True)
class Wording:
    """Texts of a line for a name that only one side has, or that both describe differently."""

    only_in_file: str
    only_in_model: str
    changed: str = ""


_OPTIONS = Wording("{} is only in the file", "{} is only here", "{}={!r} in the file, {!r} here")
_PLACES = Wording("{}: only in the file", "{}: only here")
_BASES = Wording(
    only_in_file="{!r} is not in this model",
    only_in_model="{!r} is not in the file's base",
    changed="{!r} is {} in the file's base, {} here",
)
_TENSORS = Wording(
    only_in_file="{!r}: in the file, the model has no such tensor",
    only_in_model="{!r}: in the model, missing in the file",
    changed="{!r}: {} in the file, {} in the model",
)


def differences(in_file: Mapping[str, object], in_model: Mapping[str, object], wording: Wording) -> list[str]:
    """Compare the descriptions of the file and of the model: a line for each name on which they differ."""
    lines = [wording.only_in_model.format(name) for name in in_model if name not in in_file]
    for name, description in in_file.items():
        if name not in in_model:
            lines.append(wording.only_in_file.format(name))
        elif description != in_model[name]:
            lines.append(wording.changed.format(name, description, in_model[name]))
    return lines


def outside(described: Mapping[str, Described], modules: Sequence[str]) -> dict[str, Described]:
    """Leave out the names that lie in one of the modules."""
    return {name: description for name, description in described.items() if not within(name, modules)}


def require_nothing_else_trains(model: nn.Module, record: Applied) -> None:
    """Raise `CheckpointError` if a parameter would train that no file holds."""
    saved = {id(tensor) for tensor in Adapted.of(model).saved.values()}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if loose:
        raise CheckpointError(
            f"{listed(loose, most=1)} would train, though apply froze it or did not see it. It is no part of "
            f"the file, which would then fit no base. Choose a method that trains it beside {record.name!r}; "
            "or call requires_grad_(False) on it, if it has not been trained."
        )


def require_values(model: nn.Module) -> None:
    """Raise `CheckpointError` if the model is on the meta device."""
    for name, tensor in (*own_tensors(model), *own_state(model)):
        if tensor.is_meta:
            raise CheckpointError(
                f"{name!r} is on the meta device, which holds no values: load the base's weights first."
            )


def saved_record(header: Header) -> Applied:
    """Read the record in the file; options that its methods got since then have the values of older files.

    Raises:
        CheckpointError: a method is unknown, or an option has a value that it cannot have.
    """
    record = Applied.from_json(header.document)
    for name, options in header.methods.items():
        try:
            method = find(name)
        except MedpeftError as error:
            raise CheckpointError(
                f"{header.name}: {clip(error, 2000)} If it is a method of your own, import the file that "
                "registers it before loading."
            ) from None
        record.methods[name] = {**method.options, **method.older, **options}
        try:
            layers = {layer for used, layer, _ in record.sites if used == name}
            record.methods[name] = method.read_options(record.methods[name], layers)
        except MedpeftError as error:
            raise CheckpointError(f"{header.name}: {clip(error, 2000)}") from None
    for used, layer, _ in record.sites:
        if used not in record.methods:
            adapted = f"{clip(repr(layer))} is adapted by {clip(repr(used))}"
            raise CheckpointError(f"{header.name}: {adapted}, which is none of its methods.")
    return record


def require_same_methods(header: Header, model: nn.Module, record: Applied, skipped: Sequence[str]) -> None:
    """Raise `CheckpointError`, with what differs, unless the model was adapted as the file says."""
    saved = saved_record(header)
    if saved.methods.keys() != record.methods.keys():
        lines = [f"method: {saved.name} in the file, {record.name} here"]
    else:
        lines = differences(_options(saved), _options(record), _OPTIONS)
        lines += differences(_places(saved, skipped), _places(record, skipped), _PLACES)
    if not lines and _order(saved) != _order(record):
        lines.append(f"order of adapters: {_order(saved)} in the file, {_order(record)} here")
    if saved.batchnorm != record.batchnorm:
        lines.append(f"batchnorm: {saved.batchnorm!r} in the file, {record.batchnorm!r} here")
    if lines:
        raise CheckpointError(
            f"{header.name} does not fit this {type(model).__name__}, which is adapted in another way:\n  "
            f"{as_lines(lines)}\nCall medpeft.remove(model) first, or load into a fresh model."
        )


def _order(record: Applied) -> str:
    """Name the methods in the order in which their adapters act on a layer."""
    return ", ".join(dict.fromkeys(method for method, _, _ in record.sites))


def _options(record: Applied) -> dict[str, object]:
    """Every option of every method, as JSON."""
    options = {}
    for method, values in record.methods.items():
        for option, value in values.items():
            # A tuple becomes a list.
            options[f"{method}: {option}"] = json.loads(json.dumps(value, default=repr))
    return options


def _places(record: Applied, skipped: Sequence[str]) -> dict[str, None]:
    """Every adapter and every selected parameter, in words."""
    places = [f"adapters at {f'{layer}.{weight}'!r} by {method!r}" for method, layer, weight in record.sites]
    places += [f"selected parameter {name!r}" for name in outside(record.selected, skipped)]
    return dict.fromkeys(places)


class OtherBaseError(CheckpointError):
    """The frozen weights are not those of the file's base.

    Attributes:
        found: What differs, without what to do about it.
    """

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(f"{found}\n{advice}")
        self.found = found


def require_base(header: Header, model: nn.Module, record: Applied, skipped: Sequence[str]) -> None:
    """Raise `OtherBaseError` unless the frozen weights are those of its base."""
    trained = {*record.selected, *record.statistics}
    base = identify(model, lambda name: name not in trained and not within(name, skipped))
    saved = {**header.document["base"], "tensors": outside(header.document["base"]["tensors"], skipped)}
    difference = _base_difference(saved, base)
    if difference:
        raise OtherBaseError(
            f"{header.name} was trained on another base than this {class_of(model).__name__}:\n  "
            f"{clip(difference, 1000)}",
            "Create the model as in training, with the same pretrained weights and precision, or pass "
            "check_base=False to load it nevertheless.",
        )


def _base_difference(saved: dict[str, Any], base: dict[str, Any]) -> str:
    """Describe the first of class, shapes and values in which two bases differ; "" if in none."""
    if saved["class"] != base["class"]:
        return f"architecture: {label(saved)} in the file, {label(base)} here"
    apart = differences(_shapes(saved), _shapes(base), _BASES)
    if apart:
        return f"shapes: {_first(apart)}"
    changed = [repr(name) for name, text in base["tensors"].items() if saved["tensors"][name] != text]
    if not changed:
        return ""
    labels = ""
    if label(saved) != label(base):
        labels = f" ({label(saved)} in the file, {label(base)} here)"
    count = f"{len(changed)} of {len(base['tensors'])}"
    return f"values: {count} frozen tensors are not those of its base{labels}: {_first(changed)}"


def _shapes(base: dict[str, Any]) -> dict[str, str]:
    """Shape and dtype of each tensor, from "shape dtype digest"."""
    return {name: description.rpartition(" ")[0] for name, description in base["tensors"].items()}


def _first(items: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(items[:most])
    if len(items) > most:
        shown += f", and {len(items) - most} more"
    return shown


def require_proportion(model: nn.Module, built: Sequence[Built]) -> None:
    """Raise `CheckpointError` if adapters would take far more memory than the model, beside the file.

    Random projections and singular vectors are not in a file: a few numbers in its header choose their sizes.

    Args:
        model: The model.
        built: Its adapters, on the meta device.
    """
    sizes: dict[int, int] = {}
    for item in built:
        for module in (item.adapter, *item.adapter.shared.values()):
            saved = set(module.state_dict())
            for name, buffer in module.named_buffers():
                if name not in saved:
                    sizes[id(buffer)] = buffer.numel()
    beside = sum(sizes.values())
    own = sum(tensor.numel() for _, tensor in own_tensors(model))
    if beside > max(4 * own, _ALWAYS_ALLOWED):
        raise CheckpointError(
            f"By its options, the file asks for adapters with {beside:,} numbers beside those that it holds, "
            f"and this {class_of(model).__name__} has {own:,}: it was not written for such a model."
        )


def require_fit(
    header: Header,
    model: nn.Module,
    record: Applied,
    expected: Mapping[str, Tensor],
    exact: Collection[str],
    skipped: Sequence[str],
) -> set[str]:
    """Compare the tensors of the file with those that they are to be copied into.

    Args:
        header: The file's.
        model: The model.
        record: What is, or will be, applied to it.
        expected: The tensors that a file for the model holds; of adapters not built yet, on the meta device.
        exact: Names of tensors whose dtype must keep every digit.
        skipped: Names of the modules whose tensors are left alone.

    Returns:
        Names of the tensors to copy.

    Raises:
        CheckpointError: some do not fit; the differences are named.
    """
    expected, saved = outside(expected, skipped), outside(header.tensors, skipped)
    in_file = {name: entry.shape for name, entry in saved.items()}
    in_model = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    lines = differences(in_file, in_model, _TENSORS)
    for name, tensor in expected.items():
        if name in saved and not _keeps(saved[name].dtype, tensor.dtype, every_digit=name in exact):
            dtypes = short(saved[name].dtype), short(tensor.dtype)
            lines.append(_TENSORS.changed.format(name, *dtypes))
    parameters = dict(model.named_parameters())
    for name in record.selected:
        if name not in parameters:
            lines.append(f"{name!r}: selected in the file, no parameter of the model")
    if lines:
        shown = as_lines(lines) + _class_hint(in_file, in_model, record.head)
        raise CheckpointError(f"{header.name} does not fit this {class_of(model).__name__}:\n  {shown}")
    return set(expected)


def _keeps(source: torch.dtype, destination: torch.dtype, *, every_digit: bool) -> bool:
    """Whether values can be copied from one dtype into the other."""
    if source == destination:
        return True
    if source.is_floating_point != destination.is_floating_point:
        return False
    return destination.is_floating_point and (
        not every_digit or torch.promote_types(source, destination) == destination
    )


def _class_hint(
    in_file: Mapping[str, tuple[int, ...]], in_model: Mapping[str, tuple[int, ...]], head: Sequence[str]
) -> str:
    """Say what to do about a head of another size; "" if it has the same."""
    for name, shape in in_file.items():
        if within(name, head) and shape and name in in_model and in_model[name] != shape:
            classes = f"Build the model with num_classes={shape[0]}"
            return f"\n  {classes}, or pass head='skip' or head='reinit' for another task."
    return ""
