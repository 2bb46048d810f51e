"""A safetensors file, written whole or not at all by the library safetensors."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Protocol

from torch import Tensor

from ..errors import CheckpointError
from .file import DTYPES, MAX_HEADER, short

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class SupportsWrite(Protocol):
    """A file that is open for writing."""

    def write(self, content: bytes, /) -> object:
        """Write bytes."""
        ...


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file beside under another name, flush it to the disk and rename it: a crash leaves old or new.

    Raises:
        CheckpointError: it cannot be written, or not be read again; what was there before stays.
    """
    from safetensors import SafetensorError

    _require_readable(path, tensors)
    try:
        target = os.path.realpath(path)
        if os.path.exists(target) and not os.path.isfile(target):
            raise CheckpointError(f"{path} is no file that can be written over.")
        if os.path.exists(target) and not os.stat(target).st_mode & _WRITABLE:
            raise CheckpointError(f"{path} is read-only: make it writable, or choose another name.")
        with unfinished_in(os.path.dirname(target)) as unfinished:
            _write_beside(target, unfinished, tensors, metadata)
            os.replace(unfinished, target)
        if os.name != "nt":  # Windows opens no directories.
            _flush(os.path.dirname(target), os.O_RDONLY)
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


@contextmanager
def unfinished_in(directory: str) -> Iterator[str]:
    """Name a file to write before it gets its final name; what is left of it is removed."""
    unfinished = os.path.join(directory, f".medpeft-{secrets.token_hex(8)}.tmp")
    try:
        yield unfinished
    finally:
        with suppress(OSError):  # It has its final name, or was never made.
            os.remove(unfinished)


def write_into(target: SupportsWrite, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a file into an open one, by a single call of its `write`.

    Raises:
        CheckpointError: it cannot be written, or not be read again. What was written of it stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save

    _require_readable("The open file", tensors)
    try:
        content = save(dict(tensors), metadata=dict(metadata))
        _require_short("The open file", int.from_bytes(content[:8], "little"))
        target.write(content)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The open file cannot be written: {error}. It must be open for bytes."
        ) from error


def _require_readable(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for a tensor of numbers that `read_tensors` would refuse."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{path}: {name!r} is {short(tensor.dtype)}, which medpeft does not read again: convert it."
            )


def _require_short(path: str, length: int) -> None:
    """Raise `CheckpointError` for a header that `read_layout` would refuse."""
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: the header would take {length:,} bytes, more than {MAX_HEADER:,}: shorten metadata."
        )


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
    _require_short(target, length)
    os.chmod(unfinished, mode & 0o777)  # safetensors leaves the file to its owner alone.
    _flush(unfinished, os.O_RDWR)


def _flush(path: str, flags: int) -> None:
    """Wait until what was written is on the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
