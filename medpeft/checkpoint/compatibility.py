"""Does a checkpoint fit a model? What it would apply, what it needs, and everything that stands against it."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.record import Applied, own_state, trained_tensors
from ..adapters.registry import find
from ..errors import CheckpointError, MedpeftError
from ..sharding import is_sharded
from ..surgery.build import build, state_of_built
from ..surgery.plan import Plan, statistics_names
from .file import Entry, short
from .fingerprint import own_tensors
from .header import Header


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a tensor or module of that name lies in one of the modules."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def record_of(header: Header, model: nn.Module, head: str, keep_base: bool | None) -> Applied:
    """The record that loading the file leaves on a model that is not adapted.

    Raises:
        CheckpointError: a method or an option of the file's is unknown, or the model cannot be adapted.
    """
    for name, tensor in own_tensors(model):
        if is_sharded(tensor):
            raise CheckpointError(f"{name!r} is sharded already: load the checkpoint before fully_shard.")
    said = header.document
    selected = dict(said["selected"])
    if head != "strict":
        own = {n: "head" for n, _ in model.named_parameters() if within(n, said["head"])}
        selected = {n: m for n, m in selected.items() if not within(n, said["head"])} | own
    present = dict(model.named_modules())
    return Applied(
        methods=_methods(header),
        sites=[(method, layer, weight) for method, layer, weight in dict.fromkeys(map(tuple, said["sites"]))],
        selected=selected,
        head=tuple(name for name in said["head"] if name in present),
        batchnorm=said["batchnorm"],
        statistics=statistics_names(model) if said["batchnorm"] == "adapt" else [],
        trained_before={name: p.requires_grad for name, p in model.named_parameters()},
        base=None if keep_base is False or (keep_base is None and "full" in said["methods"]) else {},
        seed=said["seed"],
        dtype=None if said["dtype"] is None else getattr(torch, said["dtype"]),
    )


def require_nothing_else_trains(model: nn.Module, record: Applied) -> None:
    """Raise `CheckpointError` if a parameter trains that no file holds; the file would then fit no base."""
    saved = {id(tensor) for _, tensor in (*own_state(model), *trained_tensors(model, record))}
    loose = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in saved]
    if loose:
        raise CheckpointError(
            f"{loose[0]!r}{f' and {len(loose) - 1} more' if len(loose) > 1 else ''} would train, though apply froze it or did "
            "not see it. It is no part of the file, which would then fit no base. Choose a method that trains it beside "
            f"{record.name!r}; or call requires_grad_(False) on it, if it has not been trained."
        )


def require_values(model: nn.Module) -> None:
    """Raise where the model is on the meta device."""
    meta = next((name for name, tensor in (*own_tensors(model), *own_state(model)) if tensor.is_meta), None)
    if meta is not None:
        raise CheckpointError(f"{meta!r} is on the meta device, which holds no values: load the base's weights first.")


def _methods(header: Header) -> dict[str, dict[str, Any]]:
    """The file's methods with their options; those added since then have their defaults."""
    found = {}
    for name, options in header.methods.items():
        try:
            known = find(name).options
        except MedpeftError as error:
            raise CheckpointError(
                f"{header.name}: {error} If it is a method of your own, import the file that registers it before loading."
            ) from None
        found[name] = {**known, **options}
    for method, layer, _ in header.document["sites"]:
        if method not in found:
            raise CheckpointError(f"{header.name}: {layer!r} is adapted by {method!r}, which is none of its methods.")
    return found


def explain(header: Header, here: Applied, model: nn.Module, *, with_head: bool) -> None:
    """Raise, with what differs, unless the model was adapted as the file says."""
    said = header.document
    wanted, found = _methods(header), {name: _as_json(own) for name, own in here.methods.items()}
    lines = [f"method: {'+'.join(wanted)} in the file, {'+'.join(found)} here"] if set(wanted) != set(found) else []
    if not lines:
        lines += [
            f"{name}: {option}={_as_json(value)!r} in the file, {found[name].get(option)!r} here"
            for name, options in wanted.items()
            for option, value in options.items()
            if found[name].get(option) != _as_json(value)
        ]
        lines += _apart("adapters at", {tuple(s) for s in said["sites"]}, set(here.sites))
        own = {n for n in here.selected if with_head or not within(n, here.head)}
        saved = {n for n in said["selected"] if with_head or not within(n, said["head"])}
        lines += _apart("selected parameters", saved, own)
    if said["batchnorm"] != here.batchnorm:
        lines.append(f"batchnorm: {said['batchnorm']!r} in the file, {here.batchnorm!r} here")
    if lines:
        listed = "\n  ".join(lines)
        raise CheckpointError(
            f"{header.name} does not fit this {type(model).__name__}, which is adapted in another way:\n  {listed}\nCall "
            "medpeft.remove(model) first, or load into a fresh model."
        )


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_json(item) for key, item in value.items()}
    return [_as_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def _apart(what: str, saved: set[Any], here: set[Any]) -> list[str]:
    lines = []
    for where, extra in (("only in the file", saved - here), ("only here", here - saved)):
        if extra:
            names = sorted(".".join(e[1:]) if isinstance(e, tuple) else e for e in extra)
            lines.append(f"{what} {', '.join(map(repr, names[:3]))}{', …' if len(names) > 3 else ''}: {where} ({len(names)})")
    return lines


def expected_tensors(model: nn.Module, record: Applied, planned: Plan | None) -> dict[str, Tensor]:
    """What a file for the model must hold, by name: of adapters that are only planned, shapes alone.

    Raises:
        CheckpointError: no adapter can be made with the options of the file.
    """
    trained = dict(trained_tensors(model, record))
    if planned is None:
        return {**dict(own_state(model)), **trained}
    try:
        built = build(model, planned.sites, record, shapes_only=True)
    except MedpeftError:
        raise
    except Exception as error:  # The options come from the file: a method may meet any type or number in them.
        raise CheckpointError(f"No adapter can be made with the options in the file, {record.methods}: {error}") from error
    return trained | dict(state_of_built(built))


def misfits(saved: Mapping[str, Entry], wanted: Mapping[str, Tensor], record: Applied, exact: Collection[str]) -> list[str]:
    """Every tensor that is missing, unexpected, misshapen or (those of `exact`) would lose digits, and what to do."""
    lines = [f"{name!r}: in the model, missing in the file" for name in wanted if name not in saved]
    lines += [f"{name!r}: in the file, the model has no such tensor" for name in saved if name not in wanted]
    heads = []
    for name, tensor in wanted.items():
        if name not in saved:
            continue
        entry = saved[name]
        if entry.shape != tuple(tensor.shape):
            lines.append(f"{name!r}: {entry.shape} in the file, {tuple(tensor.shape)} in the model")
            heads += [entry.shape[0]] if within(name, record.head) and entry.shape else []
        elif not _fits(entry.dtype, tensor.dtype, exact=name in exact):
            lines.append(f"{name!r}: {short(entry.dtype)} in the file, {short(tensor.dtype)} in the model")
    if heads:
        lines.append(f"Build the model with num_classes={heads[0]}, or pass head='skip' or head='reinit' for another task.")
    return lines


def _fits(saved: torch.dtype, own: torch.dtype, *, exact: bool) -> bool:
    """Whether values can be copied: of the same kind, and with every digit if `exact`."""
    if saved.is_floating_point != own.is_floating_point:
        return False
    return saved == own or (own.is_floating_point and (not exact or torch.promote_types(saved, own) == own))


def draw_head(model: nn.Module, record: Applied) -> dict[str, Tensor]:
    """New values for the head, by the layers' own `reset_parameters`; the model and torch's random state stay as they are.

    Raises:
        CheckpointError: a layer of the head has parameters and does not say how to draw them.
    """
    drawn: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(record.seed % 2**63)
        for name in record.head:
            for path, layer in copy.deepcopy(model.get_submodule(name)).cpu().named_modules(prefix=name):
                own = dict(layer.named_parameters(recurse=False))
                reset: Any = getattr(layer, "reset_parameters", None)
                if own and not callable(reset):
                    raise CheckpointError(f"head='reinit' cannot draw {path!r} anew ({type(layer).__name__}): use head='skip'.")
                if own:
                    reset()
                    drawn |= {f"{path}.{key}": tensor.detach() for key, tensor in own.items()}
    return {name: tensor for name, tensor in drawn.items() if name in record.selected}
