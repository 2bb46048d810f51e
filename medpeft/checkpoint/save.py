"""Save what differs from the base into one safetensors file, and load it: everything is checked before anything changes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.record import Applied, adapted_layers, own_state, require_applied, trained_tensors
from ..errors import CheckpointError
from ..sharding import is_first, reshard, whole
from .compatibility import require_nothing_else_trains, require_values
from .file import MAX_DEPTH, short, write
from .fingerprint import identify, pretrained_config
from .header import KEY, SCHEMA, compose

_INPUT = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def save(model: nn.Module, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None) -> None:
    """Write what training changed: adapters, selected parameters, head, adapting BatchNorm buffers, and nothing else.

    The file is whole or not there: it is written under another name beside (".medpeft-….tmp"), flushed to the disk and
    renamed, so that a crash leaves the old file or the new one.

    Args:
        model: A model after `apply`. One sharded by FSDP2 is gathered: then every rank has to call this, and the first writes.
            Of a model in DDP pass `model.module`; any one rank writes the same.
        path: The file, conventionally `*.safetensors`; its directory must exist.
        metadata: Whatever is worth knowing later, as JSON; names of the classes belong under "classes".

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the file cannot be written, metadata is no JSON, or the model is not as `apply` left it (on the meta
            device, within `disabled` or `merged`, a head replaced, other parameters unfrozen). A file that was there before
            stays.
    """
    record = require_applied(model)
    reshard(model)
    _check_savable(model, record)
    said = _json({} if metadata is None else metadata, "metadata")
    if not isinstance(said, dict) or not _names(said.get("classes")):
        raise CheckpointError("metadata must be a dict, and its 'classes' the names of the classes.")
    changed = {**dict(own_state(model)), **dict(trained_tensors(model, record))}
    document = _document(model, record, said)
    tensors = {name: plain(tensor) for name, tensor in changed.items()}
    if is_first(changed.values()):
        write(os.fspath(path), tensors, {KEY: compose(document, tensors)})


def _names(classes: Any) -> bool:
    return classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))


def _document(model: nn.Module, record: Applied, metadata: dict[str, Any]) -> dict[str, Any]:
    """What the header says but for the digests."""
    trained = {*record.selected, *record.statistics}
    return {
        "schema": SCHEMA,
        "medpeft": version("medpeft"),
        "methods": {name: _json(own, f"the options of {name!r}") for name, own in record.methods.items()},
        "sites": [list(site) for site in record.sites],
        "selected": record.selected,
        "head": list(record.head),
        "batchnorm": record.batchnorm,
        "statistics": record.statistics,
        "dtype": None if record.dtype is None else short(record.dtype),
        "seed": record.seed,
        "input": _input(model),
        "base": identify(model, lambda name: name not in trained),
        "metadata": metadata,
    }


def _check_savable(model: nn.Module, record: Applied) -> None:
    """Raise where the tensors of the model are not those that were trained."""
    if not record.enabled or any(not adapters.enabled for _, _, adapters in adapted_layers(model)):
        raise CheckpointError("Within medpeft.disabled or medpeft.merged a model is not as it was trained: leave it first.")
    here = {(a.method, name, a._weight) for name, _, found in adapted_layers(model) for a in [a for _, a in found.adapters()]}
    lost = [layer for method, layer, weight in record.sites if (method, layer, weight) not in here]
    names = {name for name, _ in trained_tensors(model, record)}
    lost += [name for name in (*record.selected, *record.statistics) if name not in names]
    if lost:
        raise CheckpointError(
            f"{lost[0]!r}{f' and {len(lost) - 1} more' if len(lost) > 1 else ''}, which {record.name!r} trains, is no longer "
            "as apply left it: was a layer or the head replaced? Replace it before apply."
        )
    require_nothing_else_trains(model, record)
    require_values(model)


def _adapters(found: nn.Module) -> Iterator[Adapter]:
    return (adapter for adapter in found.children() if isinstance(adapter, Adapter))


def _json(value: Any, where: str, depth: int = 4) -> Any:
    """A copy as plain JSON, or a `CheckpointError` that says which part is none."""
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if depth < MAX_DEPTH and isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: _json(item, f"{where}[{key!r}]", depth + 1) for key, item in value.items()}
    elif depth < MAX_DEPTH and isinstance(value, (list, tuple)):
        return [_json(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise CheckpointError(
        f"{where} cannot be saved: {type(value).__name__} {str(value)[:60]!r}. It must be JSON: text, finite numbers, True, "
        f"False, None, and lists and dicts (keys are text) of these, at most {MAX_DEPTH - 4} deep."
    )


def _input(model: nn.Module) -> dict[str, Any] | None:
    """What timm says of the input that the model expects, None for other models."""
    config = pretrained_config(model)
    return {key: _json(config[key], f"pretrained_cfg[{key!r}]") for key in _INPUT if key in config} or None


def plain(tensor: Tensor) -> Tensor:
    """The whole tensor in CPU memory, contiguous and sharing memory with no other."""
    full = whole(tensor).cpu().contiguous()
    return full if full.untyped_storage().nbytes() == full.nbytes else full.clone()
