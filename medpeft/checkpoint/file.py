"""A safetensors file: written whole or not at all, and read as if it were hostile.

The library safetensors writes it. Reading is done here, from one open file, so that a file replaced meanwhile cannot be read
half and half, and with limits on everything that a header declares: nothing is allocated before its size has been checked.
"""

from __future__ import annotations

import io
import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

MAX_HEADER = 4 * 2**20
"""Bytes of the longest header that is read."""

MAX_DEPTH = 16
"""Levels of the deepest JSON that is read."""

_MAX_DIMS = 12

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor: dtype, shape, and the bytes it takes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Layout:
    """A file's tensors by name, the texts beside them, and where the tensors begin."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    offset: int


def short(dtype: torch.dtype) -> str:
    """torch.float32 as "float32"."""
    return str(dtype).removeprefix("torch.")


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file under another name beside, flush it to the disk and rename it: a crash leaves the old one or the new.

    Raises:
        CheckpointError: it cannot be written; what was there before stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = ""
    try:
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise CheckpointError(f"{path} is no file that can be written over.")
        unfinished = os.path.join(os.path.dirname(target), f".medpeft-{secrets.token_hex(8)}.tmp")
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL, 0o666))
        mode = os.stat(target if os.path.exists(target) else unfinished).st_mode
        save_file(dict(tensors), unfinished, metadata=dict(metadata))
        _check_length(unfinished, path)
        os.chmod(unfinished, mode & 0o777)  # safetensors leaves the file to its owner alone.
        _flush(unfinished, os.O_RDWR)
        os.replace(unfinished, target)
        if os.name != "nt":  # Windows opens no directories.
            _flush(os.path.dirname(target), os.O_RDONLY)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            os.remove(unfinished)


def _check_length(unfinished: str, path: str) -> None:
    """Raise where the header is longer than what is read again."""
    with open(unfinished, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path}: the header would take {length:,} bytes, more than {MAX_HEADER:,}: shorten metadata.")


def _flush(path: str, flags: int) -> None:
    """Wait until what was written is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_layout(file: io.BufferedIOBase, name: str) -> Layout:
    """Read and check the header of an open file; the tensors' bytes are not read.

    Raises:
        CheckpointError: this is no safetensors file, or it was cut off or altered.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8 or length < 2:
        raise CheckpointError(f"{name} is no safetensors file, or was cut off: it has {size:,} bytes.")
    if length > MAX_HEADER:
        raise CheckpointError(f"{name} declares a header of {length:,} bytes; the limit is {MAX_HEADER:,}.")
    declared = parse(file.read(length), f"the header of {name}")
    if not isinstance(declared, dict):
        raise CheckpointError(f"The header of {name} is no JSON object.")
    extra = declared.pop("__metadata__", {})
    if not isinstance(extra, dict) or not all(isinstance(text, str) for text in extra.values()):
        raise CheckpointError(f"The header of {name} has a __metadata__ that is not text by name.")
    entries = {key: _entry(name, key, value) for key, value in declared.items()}
    _check_layout(name, entries, size - 8 - length)
    return Layout(entries, extra, 8 + length)


def parse(data: bytes | str, what: str) -> Any:
    """The JSON in a text; a `CheckpointError` where it is none, has a key twice, an infinity, or too many levels."""
    try:
        text = data.decode() if isinstance(data, bytes) else data
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_unique)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no JSON that medpeft reads: {_brief(error)}") from None
    if not _within_depth(value):
        raise CheckpointError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    return value


def _brief(error: Exception) -> str:
    return printable(str(error).replace("\n", " "))[:120]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _within_depth(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [item for c in containers for item in (c.values() if isinstance(c, dict) else c)]
        if not level:
            return True
    return False


def printable(text: str) -> str:
    """Without the control characters by which a file could write to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _entry(name: str, key: str, value: Any) -> Entry:
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype = _DTYPES.get(str(fields.get("dtype")))
    shape, offsets = _naturals(fields.get("shape")), _naturals(fields.get("data_offsets"))
    if dtype is None or shape is None or offsets is None or len(offsets) != 2 or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{name}: the header describes the tensor {key!r} by {str(value)[:120]!r}, which is not valid.")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{name}: {key!r} of shape {shape} does not take the bytes {offsets} of the header.")
    return Entry(dtype, shape, offsets[0], offsets[1])


def _naturals(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)
    return tuple(value) if good else None


def _check_layout(name: str, entries: Mapping[str, Entry], size: int) -> None:
    """Raise unless the tensors follow each other without a gap and fill the file."""
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != end:
            raise CheckpointError(f"{name}: the tensors in its header overlap or leave a gap at byte {end:,}.")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{name} was cut off or added to: its header declares {end:,} bytes of tensors, it has {size:,}.")


def read_tensors(file: io.BufferedIOBase, layout: Layout, name: str) -> dict[str, Tensor]:
    """Every tensor of an open file, on the CPU."""
    tensors = {}
    for key, entry in layout.tensors.items():
        tensors[key] = torch.empty(entry.shape, dtype=entry.dtype)
        file.seek(layout.offset + entry.start)
        size = entry.end - entry.start
        if size and file.readinto(memory(tensors[key])) != size:
            raise CheckpointError(f"{name} was cut off while it was read.")
    return tensors
