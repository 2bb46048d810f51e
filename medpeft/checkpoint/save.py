"""Save what training changed into one safetensors file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import weight_name
from ..adapters.aside import recovered
from ..adapters.record import Adapted, require_model
from ..adapters.running import switching
from ..adapters.samples import changed_statistics, changes_since_apply, made_of_other_weights
from ..adapters.wiring import is_wired
from ..architecture.layers import is_computed, way_back
from ..errors import CheckpointError, clipped, listed
from ..sharding import is_first, reshard, whole
from .compatibility import require_nothing_else_trains, require_values
from .file import MAX_DEPTH
from .fingerprint import identify, pretrained_config
from .header import KEY, compose, schema_of
from .validators import list_of, optional, text
from .writing import SupportsWrite, write, write_into

_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def save(
    model: nn.Module, path: str | os.PathLike[str] | SupportsWrite, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write what training changed, and nothing else.

    That is the adapters, the selected parameters, the head, and BatchNorm buffers that adapt. The file is
    whole or not there: it is written under another name beside (".medpeft-….tmp"), flushed and renamed.

    Args:
        model: A model after `apply`. Of one in DDP pass `model.module`; any one rank is enough. One sharded
            by FSDP2 is gathered: every rank has to call this, and the first writes.
        path: The file, conventionally `*.safetensors`; its directory must exist. Or one that is open for
            bytes, such as `io.BytesIO()`, which is written at once.
        metadata: Whatever is worth knowing later, as JSON; names of the classes belong under "classes".

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the file cannot be written; metadata is no JSON; or the model is not as `apply` left
            it (on the meta device, disabled, merged, a head replaced, other parameters unfrozen, frozen
            statistics estimated anew). An older file stays.

    Examples:
        >>> import pathlib, tempfile, medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "lora", rank=2, target="0", head="1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     medpeft.save(model, f"{folder}/a.safetensors", metadata={"classes": ["benign", "malignant"]})
        ...     [file.name for file in pathlib.Path(folder).iterdir()]
        ['a.safetensors']
    """
    require_model(model, path)
    _require_path(path)
    copied = checked_metadata({} if metadata is None else metadata)
    with switching(model, "save"):  # So that no other thread puts other values in meanwhile.
        _save(model, path, copied)


def _save(model: nn.Module, path: str | os.PathLike[str] | SupportsWrite, metadata: dict[str, Any]) -> None:
    """Write the file of a model whose values stay in place meanwhile."""
    adapted = savable(model, "save")
    document = _document(adapted, metadata)
    tensors = {name: plain(tensor) for name, tensor in adapted.saved.items()}
    if not is_first(adapted.saved.values()):
        return
    described = {KEY: compose(document, tensors)}
    if isinstance(path, (str, os.PathLike)):
        write(os.fspath(path), tensors, described)
    else:
        write_into(path, tensors, described)


def savable(model: nn.Module, action: str) -> Adapted:
    """Look at a model whose tensors are those that were trained.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the model is not as `apply` left it.
    """
    reshard(model)
    adapted = recovered(model, action)
    _require_savable(adapted)
    return adapted


def _require_path(path: object) -> None:
    """Raise `CheckpointError` unless it is a path, or can be written to."""
    is_path = isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str)
    if is_path or callable(getattr(path, "write", None)):
        return
    raise CheckpointError(
        f"path={clipped(path)} must be the path of a file, as text or a pathlib.Path, or an open file."
    )


def _document(adapted: Adapted, metadata: dict[str, Any]) -> dict[str, Any]:
    """Describe the content of the header, without the digests."""
    record = adapted.record
    methods = {
        name: _as_json(options, f"the options of {name!r}") for name, options in record.methods.items()
    }
    trained = {*record.selected, *record.statistics}
    return {
        "schema": schema_of(record.methods),
        "medpeft": version("medpeft"),
        **record.to_json(),
        "methods": methods,
        "input": _input(adapted.model),
        "base": identify(adapted.model, lambda name: name not in trained, record.samples),
        "metadata": metadata,
    }


def _require_savable(adapted: Adapted) -> None:
    """Raise `CheckpointError` unless the tensors of the model are those that were trained."""
    record = adapted.record
    if not adapted.acting:
        raise CheckpointError(
            "Within medpeft.disabled, scaled or merged a model is not as it was trained: leave it first."
        )
    present = set()
    for name, _, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            present.add((adapter.method, name, weight_name(adapter)))
    lost = [site[1] for site in record.sites if site not in present]
    # A norm that timm freezes has buffers in the place of its parameters.
    lost += [name for name in record.selected if not isinstance(adapted.trained.get(name), nn.Parameter)]
    lost += [name for name in record.statistics if name not in adapted.trained]
    if lost:
        raise CheckpointError(
            f"{listed(lost, most=1)}, which {record.name!r} trains, is no longer as apply left it: was a "
            f"layer or the head replaced? Replace it before apply."
        )
    require_nothing_else_trains(adapted.model, record)
    require_values(adapted.model)
    _require_own_forwards(adapted)
    changes = changes_since_apply(adapted.model, record)
    statistics = changed_statistics(changes)
    if statistics:
        raise CheckpointError(
            f"{listed(statistics, most=1)}, frozen by apply, has other values since: were the statistics "
            "reset or estimated anew (SWA, SyncBatchNorm)? The file would not fit the base: load them again."
        )
    outdated = made_of_other_weights(adapted, changes)
    if outdated:
        raise CheckpointError(
            f"{listed(outdated, most=1)} has other weights than those that {record.name!r} took apart at "
            f"apply, and loading would take apart these: load weights first, then apply."
        )


def _require_own_forwards(adapted: Adapted) -> None:
    """Raise `CheckpointError` for a layer that lost the forward of its adapters, or its own weight."""
    for name, layer, adapters in adapted.layers:
        if any(True for _ in adapters.adapters()) and not is_wired(layer):
            raise CheckpointError(
                f"{name} ({type(layer).__name__}) has lost the forward of its adapters: was it converted, as "
                "to SyncBatchNorm? The file would hold what the model does not compute. Convert first, then "
                "apply."
            )
        for _, adapter in adapters.adapters():
            weight = weight_name(adapter)
            if weight and is_computed(layer, weight):
                raise CheckpointError(
                    f"The {weight} of {name} is computed in every forward since apply, and a file of it "
                    f"could be loaded nowhere: {way_back(layer, weight)}."
                )


def checked_metadata(metadata: object) -> dict[str, Any]:
    """Copy metadata as plain JSON.

    Raises:
        CheckpointError: it is no JSON, or its classes are no names.
    """
    copied = _as_json(metadata, "metadata")
    if not isinstance(copied, dict) or not optional(list_of(text))(copied.get("classes")):
        raise CheckpointError("metadata must be a dict, and its 'classes' the names of the classes.")
    return copied


def _as_json(value: Any, where: str, depth: int = 4) -> Any:
    """Copy a value as plain JSON, or raise a `CheckpointError` that says which part is none."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth < MAX_DEPTH and isinstance(value, Mapping) and all(map(text, value)):
        return {key: _as_json(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    if depth < MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_as_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise CheckpointError(
        f"{where} cannot be saved: {type(value).__name__} {str(value)[:60]!r}. It must be JSON: text, finite "
        f"numbers, True, False, None, and lists and dicts (keys are text) of these, at most {MAX_DEPTH - 4} "
        "deep."
    )


def _input(model: nn.Module) -> dict[str, Any] | None:
    """Describe the input that the model expects, as timm says it; None for other models."""
    config = pretrained_config(model)
    description = {key: _as_json(config[key], f"pretrained_cfg[{key!r}]") for key in _INPUT if key in config}
    return description or None


def plain(tensor: Tensor) -> Tensor:
    """Return the whole tensor in CPU memory, contiguous and sharing memory with no other."""
    full = whole(tensor).cpu().contiguous()
    if full.untyped_storage().nbytes() == full.nbytes:
        return full
    return full.clone()
