"""A safetensors file, read as if it were hostile.

The library safetensors reads the tensors. The header is read here: the library gives
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

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}  # fmt: skip

_ENTRY = fields(
    {
        "dtype": one_of(*DTYPES),
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
        entries[key] = Entry(DTYPES[declared[key]["dtype"]], tuple(declared[key]["shape"]))
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
        value = json.loads(
            text,
            parse_float=_finite,
            parse_constant=_refuse_constant,
            object_pairs_hook=_without_repetition,
        )
        depth = _depth(value)
    except (ValueError, RecursionError) as error:
        reason = clip(str(error).replace("\n", " "), 120)
        raise CheckpointError(f"{what} is no JSON that medpeft reads: {reason}") from None
    if depth > MAX_DEPTH:
        raise CheckpointError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    return value


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number} is no finite number")
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
    depth, level = 0, [value]
    while True:
        inner: list[Any] = []
        nests = False
        for one in level:
            if isinstance(one, list):
                nests = True
                inner += one
            elif isinstance(one, dict):
                nests = True
                inner += one.values()
        if not nests:
            return depth
        depth, level = depth + 1, inner
