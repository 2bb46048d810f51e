"""A checkpoint's header: what was done to which base, as one JSON document in a safetensors file; read as if it were hostile.

The library safetensors writes the file. Reading is done here from one open file, with limits on everything that it declares:
nothing is mapped into memory or allocated before its size has been checked against the file's.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from .base import label
from .errors import CheckpointError

SCHEMA = 1
KEY = "medpeft"
MAX_HEADER = 8 * 2**20
MAX_DEPTH = 16
_MAX_DIMS = 12

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Entry:
    """What the header says of one tensor: dtype, shape, and the bytes it takes after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself. Print it.

    Attributes:
        name: Name of the file.
        document: methods, sites, selected parameters, head, BatchNorm policy, base, metadata and version, as JSON.
        tensors: Every tensor of the file by name: an object with `dtype` and `shape`.
        offset: Where in the file the tensors begin.
    """

    name: str
    document: dict[str, Any]
    tensors: dict[str, Entry]
    offset: int

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """Every method with its options."""
        found: dict[str, dict[str, Any]] = self.document["methods"]
        return found

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given to `save` as `metadata`."""
        found: dict[str, Any] = self.document["metadata"]
        return found

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None if `metadata` had none."""
        return self.metadata.get("classes")

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        tensors = {n: {"dtype": _short(e.dtype), "shape": list(e.shape)} for n, e in self.tensors.items()}
        return {"file": self.name, **self.document, "tensors": tensors}

    def __str__(self) -> str:
        said = self.document
        size = sum(entry.end - entry.start for entry in self.tensors.values())
        layers = list(dict.fromkeys(site[1] for site in said["sites"]))
        lines = {
            "methods": "\n".join(_call(name, options) for name, options in self.methods.items()),
            "tensors": f"{len(self.tensors)}, {self.parameters:,} elements, {size:,} bytes",
            "layers": f"{len(layers)}: {_few(layers)}" if layers else "",
            "selected": f"{len(said['selected'])}: {_few(said['selected'])}" if said["selected"] else "",
            "head": ", ".join(said["head"]) or "none",
            "classes": _few(self.classes or []),
            "BatchNorm": said["batchnorm"],
            "base": f"{label(said['base'])}, values {said['base']['values']}",
            "input": ", ".join(f"{k}={v}" for k, v in (said["input"] or {}).items()),
            "metadata": "\n".join(f"{k}: {v}" for k, v in self.metadata.items() if k != "classes"),
            "written by": f"medpeft {said['medpeft']}, schema {said['schema']}",
        }
        shown = [f"  {key:<11}{text}".replace("\n", "\n" + " " * 13) for key, text in lines.items() if text]
        return _printable("\n".join([f"{self.name}: {'+'.join(self.methods)}", *shown]))


def _call(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _few(items: Any, count: int = 4) -> str:
    listed = list(items)
    return ", ".join(map(str, listed[:count])) + (", …" if len(listed) > count else "")


def _printable(text: str) -> str:
    """Without the control characters by which a file could write to a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compose(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The document as the text that goes into the header, with digests of the tensors and of itself.

    Raises:
        CheckpointError: it is longer than `MAX_HEADER` allows.
    """
    sums = [[n, _short(t.dtype), list(t.shape), _hash(memory(t))] for n, t in sorted(tensors.items())]
    signed = {**document, "content": _hash(_canonical(sums))}
    text = json.dumps({**signed, "digest": _hash(_canonical(signed))}, allow_nan=False, separators=(",", ":"))
    # The names of the tensors stand in the header once more; what is left is ample for them.
    if len(text) > MAX_HEADER // 2:
        raise CheckpointError(f"The header would take {len(text):,} bytes, more than {MAX_HEADER // 2:,}: shorten metadata.")
    return text


def memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy arrays are buffers


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_header(file: IO[bytes], name: str) -> Header:
    """Read and check the header of an open file; the tensors' bytes are not read.

    Raises:
        CheckpointError: this is no file of medpeft's, it was altered or cut off, or a later version wrote it.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8 or length < 2:
        raise CheckpointError(f"{name} is no safetensors file, or was cut off: it has {size:,} bytes.")
    if length > MAX_HEADER:
        raise CheckpointError(f"{name} declares a header of {length:,} bytes; the limit is {MAX_HEADER:,}.")
    declared = _parse(file.read(length), f"the header of {name}")
    if not isinstance(declared, dict):
        raise CheckpointError(f"The header of {name} is no JSON object.")
    extra = declared.pop("__metadata__", None)
    text = extra.get(KEY) if isinstance(extra, dict) else None
    entries = {key: _entry(name, key, value) for key, value in declared.items()}
    _check_layout(name, entries, size - 8 - length)
    if not isinstance(text, str):
        raise CheckpointError(
            f"{name} was not written by medpeft.save: its header has no {KEY!r} entry. For LoRA files of peft or diffusers "
            "there are medpeft.interchange.from_peft and from_diffusers."
        )
    return Header(name, _document(name, text), entries, 8 + length)


def _parse(data: bytes | str, what: str) -> Any:
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
    return _printable(str(error).replace("\n", " "))[:120]


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


def _entry(name: str, key: str, value: Any) -> Entry:
    fields = value if isinstance(value, dict) else {}
    dtype = _DTYPES.get(fields.get("dtype", "")) if isinstance(fields.get("dtype"), str) else None
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if dtype is None or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > _MAX_DIMS:
        raise CheckpointError(f"{name}: the header describes the tensor {key!r} by {str(value)[:120]!r}, which is not valid.")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise CheckpointError(f"{name}: {key!r} of shape {tuple(shape)} does not take the bytes {offsets} of the header.")
    return Entry(dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**48 for n in value)


def _check_layout(name: str, entries: Mapping[str, Entry], size: int) -> None:
    """Raise unless the tensors follow each other without a gap and fill the file."""
    end = 0
    for entry in sorted(entries.values(), key=lambda e: (e.start, e.end)):
        if entry.start != end:
            raise CheckpointError(f"{name}: the tensors in its header overlap or leave a gap at byte {end:,}.")
        end = entry.end
    if end != size:
        raise CheckpointError(f"{name} was cut off or added to: its header declares {end:,} bytes of tensors, it has {size:,}.")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _named(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(item, kind) for item in value.values())


_FIELDS: dict[str, Any] = {
    "medpeft": lambda v: isinstance(v, str),
    "methods": lambda v: _named(v, dict),
    "sites": lambda v: isinstance(v, list) and all(_texts(site) and len(site) == 3 for site in v),
    "selected": lambda v: _named(v, str),
    "head": _texts,
    "batchnorm": lambda v: v in ("frozen", "adapt"),
    "statistics": _texts,
    "dtype": lambda v: v is None or (isinstance(v, str) and v in _FLOATS),
    "seed": lambda v: type(v) is int,
    "input": lambda v: v is None or isinstance(v, dict),
    "base": lambda v: (
        _named(v.get("tensors") if isinstance(v, dict) else None, str)
        and all(isinstance(v.get(k), str) for k in ("class", "module", "architecture", "tag", "shapes", "values"))
    ),
    "metadata": lambda v: isinstance(v, dict) and (v.get("classes") is None or _texts(v["classes"])),
    "content": lambda v: isinstance(v, str),
}


def _document(name: str, text: str) -> dict[str, Any]:
    document = _parse(text, f"what medpeft wrote in {name}")
    schema = document.get("schema") if isinstance(document, dict) else None
    if type(schema) is not int or schema < 1:
        raise CheckpointError(f"{name} does not say by which schema it was written: it was altered.")
    if schema > SCHEMA:
        raise CheckpointError(f"{name} has schema {schema}, this medpeft reads up to {SCHEMA}: install a later medpeft.")
    digest = document.pop("digest", None)
    if digest != _hash(_canonical(document)):
        raise CheckpointError(f"{name} was altered: its header is not what medpeft wrote.")
    for field, fits in _FIELDS.items():
        if field not in document or not fits(document[field]):
            raise CheckpointError(f"{name}: its header has no valid {field!r} entry.")
    return dict(document)


def read_tensors(file: IO[bytes], header: Header) -> dict[str, Tensor]:
    """Every tensor of an open file, on the CPU, checked against the digest in the header.

    Raises:
        CheckpointError: the tensors are not those that were written.
    """
    tensors = {}
    for name, entry in header.tensors.items():
        tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
        file.seek(header.offset + entry.start)
        if entry.end > entry.start and file.readinto(memory(tensors[name])) != entry.end - entry.start:  # type: ignore[attr-defined]
            raise CheckpointError(f"{header.name} was cut off while it was read.")
    sums = [[n, _short(t.dtype), list(t.shape), _hash(memory(t))] for n, t in sorted(tensors.items())]
    if _hash(_canonical(sums)) != header.document["content"]:
        raise CheckpointError(f"{header.name} was altered: its tensors are not those that medpeft wrote.")
    return tensors
