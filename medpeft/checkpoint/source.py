"""The source of a checkpoint: a path, bytes, or an open file."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..adapters.record import require_model
from ..errors import CheckpointError, clipped

Source = str | os.PathLike[str] | bytes | bytearray | memoryview | io.BufferedIOBase


def name_of(source: Source) -> str:
    """Return the name of the file for messages.

    Raises:
        CheckpointError: it is neither a path nor bytes nor a file that is open for bytes.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the file given as {len(source):,} bytes"
    if isinstance(source, io.BufferedIOBase):
        return "the open file"
    if isinstance(source, (str, os.PathLike)) and isinstance(os.fspath(source), str):
        return os.fspath(source)
    raise CheckpointError(f"{clipped(source)} must be the path of a file, its bytes, or one open for bytes.")


def path_of(model: object, path: object) -> str:
    """Return a path as text, for a function that takes a model and the path of a file or of a directory.

    Raises:
        CheckpointError: it is no path.
        MedpeftError: the model is none.
    """
    require_model(model, path)
    if isinstance(path, (str, os.PathLike)) and isinstance(os.fspath(path), str):
        return os.fspath(path)
    raise CheckpointError(f"{clipped(path)} must be a path, as text or a pathlib.Path.")


@contextmanager
def opened(source: Source) -> Iterator[io.BufferedIOBase]:
    """Open a file for reading.

    Raises:
        CheckpointError: it cannot be opened or read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
        return
    name = name_of(source)
    if isinstance(source, io.BufferedIOBase):
        yield _readable(source)
        return
    if name.startswith("hf://"):
        raise CheckpointError(
            f"{name} is no path. Download the file first, and pass the path that this returns: "
            "huggingface_hub.hf_hub_download('owner/repository', 'file.safetensors')."
        )
    if not os.path.isfile(name):  # A pipe would wait, a device may never end.
        raise CheckpointError(f"{name} cannot be read: there is no such file.")
    try:
        with open(name, "rb") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error}") from error


def _readable(source: io.BufferedIOBase) -> io.BufferedIOBase:
    """Return an open file, which is read from its beginning.

    Raises:
        CheckpointError: it is closed, or cannot be read or sought in.
    """
    if source.closed or not (source.readable() and source.seekable()):
        raise CheckpointError("The open file cannot be read from its beginning: open it with mode 'rb'.")
    return source
