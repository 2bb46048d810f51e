"""A safetensors file: written whole or not at all, and read as if it were hostile.

The library safetensors writes the file and reads the tensors. The header is read here: the library gives
headers only of files that it opens by name and maps into memory, where one written over meanwhile is read
half and half, and one cut off kills the process. What is read

- comes from one open file,
- is checked against the length of the file before memory is taken,
- is strict JSON of limited length and depth.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from .messages import clip
from .validators import fields, list_of, one_of, size

MAX_HEADER = 4 * 2**20
"""Bytes of the longest header that is read."""

MAX_DEPTH = 16
"""Levels of the deepest JSON that is read."""

_MAX_DIMS = 12

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip

_ENTRY = fields(
    {
        "dtype": one_of(*_DTYPES),
        "shape": list_of(size, lengths=range(_MAX_DIMS + 1)),
        "data_offsets": list_of(size),
    }
)


@dataclass(frozen=True)
class Entry:
    """Description of one tensor in the header.

    Attributes:
        dtype: Its dtype.
        shape: Its shape.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes that the tensor takes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Description of the whole file in the header.

    Attributes:
        tensors: The tensors by name.
        metadata: The texts beside them by name.
        size: Bytes of the whole file.
    """

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    size: int


def short(dtype: torch.dtype) -> str:
    """Return torch.float32 as "float32"."""
    return str(dtype).removeprefix("torch.")


def memory(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in CPU memory, without a copy."""
    flat = tensor.reshape(-1).view(torch.uint8)  # (…,) → (bytes,)
    return memoryview(flat.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def digest(data: bytes | memoryview, size: int = 16) -> str:
    """Return a digest of `size` bytes, as hexadecimal text."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file beside under another name, flush it to the disk and rename it: a crash leaves old or new.

    Raises:
        CheckpointError: it cannot be written, or not be read again; what was there before stays.
    """
    from safetensors import SafetensorError

    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES.values():
            raise CheckpointError(
                f"{path}: {name!r} is {short(tensor.dtype)}, which medpeft does not read again: convert it."
            )
    try:
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise CheckpointError(f"{path} is no file that can be written over.")
        if os.path.exists(target) and not os.stat(target).st_mode & _WRITABLE:
            raise CheckpointError(f"{path} is read-only: make it writable, or choose another name.")
        unfinished = os.path.join(os.path.dirname(target), f".medpeft-{secrets.token_hex(8)}.tmp")
        try:
            _write_beside(target, unfinished, tensors, metadata)
            os.replace(unfinished, target)
        finally:
            with suppress(OSError):  # It has its final name, or was never made.
                os.remove(unfinished)
        if os.name != "nt":  # Windows opens no directories.
            _flush(os.path.dirname(target), os.O_RDONLY)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _write_beside(
    target: str, unfinished: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the unfinished file and flush it, with the permissions of the target or of any new file."""
    from safetensors.torch import save_file

    os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL, 0o666))
    mode = os.stat(unfinished).st_mode
    if os.path.exists(target):
        mode = os.stat(target).st_mode
    save_file(dict(tensors), unfinished, metadata=dict(metadata))
    with open(unfinished, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{target}: the header would take {length:,} bytes, more than {MAX_HEADER:,}: shorten metadata."
        )
    os.chmod(unfinished, mode & 0o777)  # safetensors leaves the file to its owner alone.
    _flush(unfinished, os.O_RDWR)


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
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= total - 8:
        raise CheckpointError(f"{name} is no safetensors file, or was cut off: it has {total:,} bytes.")
    if length > MAX_HEADER:
        raise CheckpointError(f"{name} declares a header of {length:,} bytes; the limit is {MAX_HEADER:,}.")
    declared = parse(file.read(length), f"the header of {name}")
    if not isinstance(declared, dict):
        raise CheckpointError(f"The header of {name} is no JSON object.")
    metadata = declared.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"The header of {name} has a __metadata__ that is not text by name.")
    return Layout(_entries(declared, total - 8 - length, name), metadata, total)


def _entries(declared: dict[str, Any], total: int, name: str) -> dict[str, Entry]:
    """Check that the tensors fill the file without a gap, and return them in that order."""
    for key, entry in declared.items():
        if not _ENTRY(entry):
            tensor = f"the tensor {clip(repr(key))} by {clip(repr(entry))}"
            raise CheckpointError(f"{name}: the header describes {tensor}, which is not valid.")
    entries: dict[str, Entry] = {}
    end = 0
    for key in sorted(declared, key=lambda key: declared[key]["data_offsets"]):
        start = end
        entries[key] = Entry(_DTYPES[declared[key]["dtype"]], tuple(declared[key]["shape"]))
        end += entries[key].bytes
        if declared[key]["data_offsets"] != [start, end]:
            raise CheckpointError(
                f"{name}: the tensors in its header overlap or leave a gap: {clip(repr(key))} of shape "
                f"{entries[key].shape} does not take the bytes from {start:,} to {end:,}."
            )
    if end != total:
        raise CheckpointError(
            f"{name} was cut off or added to: its header declares {end:,} bytes of tensors, it has {total:,}."
        )
    return entries


def read_tensors(file: io.BufferedIOBase, layout: Layout, name: str) -> dict[str, Tensor]:
    """Read every tensor of an open file, on the CPU.

    Raises:
        CheckpointError: the file is no longer what its header was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    file.seek(0)
    try:
        tensors = load(file.read(layout.size))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} was cut off or altered: {clip(error)}") from error
    present = {key: Entry(tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    if present != layout.tensors:
        raise CheckpointError(f"{name} was altered while it was read.")
    return {
        key: tensors[key] for key in layout.tensors
    }  # The library's order changes from process to process.


def parse(data: bytes | str, what: str) -> Any:
    """Read JSON that has no key twice in an object, no infinity, and at most `MAX_DEPTH` levels.

    Raises:
        CheckpointError: the text is none.
    """
    try:
        text = data
        if isinstance(data, bytes):
            text = data.decode()
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_without_repetition)
        json.dumps(value, allow_nan=False)  # 1e999 is read as infinity
        depth = _depth(value)
    except (ValueError, RecursionError) as error:
        reason = clip(str(error).replace("\n", " "), 120)
        raise CheckpointError(f"{what} is no JSON that medpeft reads: {reason}") from None
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and objects in each other."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return 0
    return 1 + max(map(_depth, value), default=0)
