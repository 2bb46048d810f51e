"""Where a checkpoint is read from: a path, bytes, or the Hugging Face Hub."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError

Source = str | os.PathLike[str] | bytes | bytearray | memoryview

_HUB = "hf://"


def name_of(source: Source) -> str:
    """What to call the file in messages."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"the file given as {len(source):,} bytes"
    return os.fspath(source)


@contextmanager
def opened(source: Source) -> Iterator[io.BufferedIOBase]:
    """The file, open for reading; a reference to the Hub is downloaded by huggingface_hub, which keeps a copy.

    Raises:
        CheckpointError: it cannot be opened or read.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        yield io.BytesIO(source)
        return
    name = name_of(source)
    path = _downloaded(name) if name.startswith(_HUB) else name
    if os.path.exists(path) and not os.path.isfile(path):
        raise CheckpointError(f"{name} is no file.")
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the `with` below, which reports errors of reading apart
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{name} cannot be read: {error}") from error
    with file:
        yield file


def _downloaded(reference: str) -> str:
    """Path of a local copy of "hf://owner/repository[@revision]/file"."""
    parts = reference.removeprefix(_HUB).split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise CheckpointError(f"{reference} names no file on the Hub: write hf://owner/repository/file.safetensors.")
    owner, (repository, _, revision), file = parts[0], parts[1].partition("@"), parts[2]
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise CheckpointError(f"{reference} needs huggingface_hub: pip install huggingface_hub.") from error
    try:
        return str(hf_hub_download(f"{owner}/{repository}", file, revision=revision or None))
    except Exception as error:  # whatever its HTTP library raises
        raise CheckpointError(f"{reference} cannot be downloaded: {error}") from error
