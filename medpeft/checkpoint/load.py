"""Load a checkpoint: everything is checked before anything changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..adapters.adapter import state_of
from ..adapters.record import Applied, adapted_layers, applied, own_state, trained_tensors
from ..errors import CheckpointError, MedpeftError, require_choice
from ..sharding import overwrite, reshard
from ..surgery.apply import carry_out, forget
from ..surgery.build import build
from ..surgery.install import Built as One
from ..surgery.plan import Plan, plan_from
from .compatibility import draw_head, expected_tensors, explain, misfits, record_of, require_values, within
from .fingerprint import class_of, differences, identify
from .header import Header, read, read_values
from .source import Source, name_of, opened

Built = list[One]


def inspect(path: Source) -> Header:
    """What a checkpoint says of itself, from its header alone. Print it.

    Args:
        path: As for `load`.

    Raises:
        CheckpointError: there is no such file, or it is no checkpoint of medpeft's.
    """
    with opened(path) as file:
        return read(file, name_of(path))


def load(
    model: nn.Module, path: Source, *, check_base: bool = True, head: str = "strict", keep_base: bool | None = None
) -> nn.Module:
    """Load a checkpoint: onto the base it was trained on, or into a model adapted in the same way.

    A base is adapted as the file says and trained from there or used. In a model that is adapted already with the same
    methods, options and sites the values are swapped in place: no parameter is replaced, so optimizers keep theirs and a
    compiled model stays compiled.

    Args:
        model: The base with its pretrained weights loaded, or a model after `apply` or `load`.
        path: A path, the file's bytes, or "hf://owner/repository[@revision]/file" on the Hugging Face Hub (the one case that
            uses a network; needs huggingface_hub).
        check_base: Raise where class, shapes or sampled values of the frozen weights are not those of the base of the file, or
            where a dtype would lose digits. False loads wherever the shapes allow it.
        head: "strict" loads the head; "skip" leaves the model's own as it is; "reinit" draws it anew from the file's seed, both
            for another task.
        keep_base: As in `apply`, for a model that is not adapted yet.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is damaged, or does not fit; the message lists everything that is missing, unexpected or
            misshapen. The model is untouched.
    """
    require_choice("head", head, ("strict", "skip", "reinit"))
    with opened(path) as file:
        header = read(file, name_of(path))
        try:
            fresh, record = _record(model, header, head, keep_base)
            if check_base:
                _check_base(model, header, record, head)
            planned = plan_from(model, record) if fresh else None
            wanted = _check_fit(model, header, record, planned, head, check_base)
            values = {name: t for name, t in read_values(file, header).items() if name in wanted}
            values |= draw_head(model, record) if head == "reinit" else {}
            built = _fill(build(model, planned.sites, record), values) if planned else []
        except CheckpointError:
            raise
        except MedpeftError as error:
            raise CheckpointError(f"{header.name} does not fit this {class_of(model).__name__}: {error}") from error
    if planned is None:
        copy_values(model, record, values)
    else:
        settle(planned, built, values)
    return model


def settle(planned: Plan, built: Built, values: dict[str, Tensor]) -> None:
    """Adapt a model with adapters that hold their values already, and copy the rest; after an error it is not adapted."""
    carry_out(planned, built)
    try:
        copy_values(planned.model, planned.record, values)
    except BaseException:
        forget(planned.model)
        raise


def _record(model: nn.Module, header: Header, head: str, keep_base: bool | None) -> tuple[bool, Applied]:
    """Whether the model is not adapted yet, and the record of what will be, or is, applied to it."""
    require_values(model)
    here = applied(model)
    if here is not None:
        if not here.enabled or any(not adapters.enabled for _, _, adapters in adapted_layers(model)):
            raise CheckpointError("Leave medpeft.disabled or medpeft.merged before loading.")
        explain(header, here, model, with_head=head == "strict")
        return False, here
    below = next((name for name, module in model.named_modules() if applied(module) is not None), None)
    if below is not None:
        raise CheckpointError(f"The {type(model).__name__} only wraps the adapted model: load into its {below!r}.")
    return True, record_of(header, model, head, keep_base)


def _check_base(model: nn.Module, header: Header, record: Applied, head: str) -> None:
    trained = {*record.selected, *record.statistics}
    kept = head == "strict"
    here = identify(model, lambda name: name not in trained and (kept or not within(name, record.head)))
    saved = header.document["base"]
    if not kept:
        saved = {**saved, "tensors": {n: t for n, t in saved["tensors"].items() if not within(n, record.head)}}
    found = differences(saved, here)
    if found:
        raise CheckpointError(
            f"{header.name} was trained on another base than this {class_of(model).__name__}:\n  {found[0]}\nCreate the model "
            "as in training, with the same pretrained weights and precision, or pass check_base=False to load it nevertheless."
        )


def _check_fit(model: nn.Module, header: Header, record: Applied, planned: Plan | None, head: str, exact: bool) -> set[str]:
    """Names of the tensors to load; a `CheckpointError` lists everything that does not fit."""
    wanted = expected_tensors(model, record, planned)
    saved = dict(header.tensors)
    if head != "strict":
        wanted = {name: tensor for name, tensor in wanted.items() if not within(name, record.head)}
        saved = {name: entry for name, entry in saved.items() if not within(name, record.head)}
    # Adapters that are still to be built take the dtype of the file.
    lossless = () if not exact else (*record.selected, *record.statistics) if planned else tuple(wanted)
    problems = misfits(saved, wanted, record, lossless)
    own = {name for name, _ in model.named_parameters()}
    problems += [f"{name!r}: selected in the file, no parameter of the model" for name in record.selected if name not in own]
    if problems:
        listed = "\n  ".join(problems)
        raise CheckpointError(f"{header.name} does not fit this {class_of(model).__name__}:\n  {listed}")
    return set(wanted)


def _fill(built: Built, values: dict[str, Tensor]) -> Built:
    """Put the file's values into adapters that are not yet in the model, in the dtype that they were saved in."""
    for item in built:
        adapter = item.adapter
        prefix = f"{item.site.name}.adapters.{item.name}.".lstrip(".")
        state = state_of(adapter)
        saved = {name: values.pop(prefix + name) for name in state if prefix + name in values}  # Shared tensors come once.
        dtype = next((t.dtype for t in saved.values() if t.is_floating_point()), None)
        if dtype is not None:
            adapter.to(dtype=dtype)
            for module in adapter.shared.values():
                module.to(dtype=dtype)
        with torch.no_grad():
            own = state_of(adapter)
            for name, value in saved.items():
                own[name].copy_(value)
    return built


def copy_values(model: nn.Module, record: Applied, values: dict[str, Tensor]) -> None:
    """Copy the values into the model's own tensors; after an error all are as before."""
    reshard(model)
    own = {**dict(own_state(model)), **dict(trained_tensors(model, record))}
    overwrite((own[name], value) for name, value in values.items())
