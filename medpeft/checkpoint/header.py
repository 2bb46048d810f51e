"""A checkpoint's header: what was done to which base, as one JSON document that is checked against its own digest."""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from .file import Entry, Layout, memory, parse, printable, read_layout, read_tensors, short
from .fingerprint import label

SCHEMA = 1
"""Version of the document; a later medpeft reads all earlier ones."""

KEY = "medpeft"
"""Name of the document in the file's `__metadata__`."""

_FLOATS = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself. Print it.

    Attributes:
        name: Name of the file.
        document: methods, sites, selected parameters, head, BatchNorm policy, base, metadata and version, as JSON.
        layout: The file's tensors by name, each with `dtype` and `shape`.
    """

    name: str
    document: dict[str, Any]
    layout: Layout

    @property
    def tensors(self) -> dict[str, Entry]:
        """Every tensor of the file by name: an object with `dtype` and `shape`."""
        return self.layout.tensors

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
        tensors = {n: {"dtype": short(e.dtype), "shape": list(e.shape)} for n, e in self.tensors.items()}
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
        return printable("\n".join([f"{self.name}: {'+'.join(self.methods)}", *shown]))


def _call(name: str, options: Mapping[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _few(items: Any, count: int = 4) -> str:
    listed = list(items)
    return ", ".join(map(str, listed[:count])) + (", …" if len(listed) > count else "")


def compose(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """The document as the text that goes into the header, with digests of the tensors and of itself."""
    signed = {**document, "content": _content(tensors)}
    return json.dumps({**signed, "digest": _hash(_canonical(signed))}, allow_nan=False, separators=(",", ":"))


def _content(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes."""
    return _hash(_canonical([[n, short(t.dtype), list(t.shape), _hash(memory(t))] for n, t in sorted(tensors.items())]))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


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


def read(file: io.BufferedIOBase, name: str) -> Header:
    """Read and check the header of an open file; the tensors' bytes are not read.

    Raises:
        CheckpointError: this is no file of medpeft's, it was altered or cut off, or a later version wrote it.
    """
    layout = read_layout(file, name)
    if KEY not in layout.metadata:
        raise CheckpointError(
            f"{name} was not written by medpeft.save: its header has no {KEY!r} entry. For LoRA files of peft or diffusers "
            "there are medpeft.interchange.from_peft and from_diffusers."
        )
    return Header(name, _document(name, layout.metadata[KEY]), layout)


def read_values(file: io.BufferedIOBase, header: Header) -> dict[str, Tensor]:
    """Every tensor of an open file, on the CPU, checked against the digest in the header.

    Raises:
        CheckpointError: the tensors are not those that were written.
    """
    tensors = read_tensors(file, header.layout, header.name)
    if _content(tensors) != header.document["content"]:
        raise CheckpointError(f"{header.name} was altered: its tensors are not those that medpeft wrote.")
    return tensors


def _document(name: str, text: str) -> dict[str, Any]:
    document = parse(text, f"what medpeft wrote in {name}")
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
