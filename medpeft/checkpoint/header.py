"""A checkpoint's header: one JSON document about the methods and the base, with a digest of itself."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from ..adapters.by_place import ByPlace, shown
from ..adapters.options import DTYPES
from ..adapters.record import BatchNormPolicy
from ..adapters.registry import find, methods
from ..errors import CheckpointError
from .file import Entry, Layout, digest, memory, parse, read_layout, read_tensors, short
from .fingerprint import label
from .messages import clip, printable
from .validators import by_name, fields, list_of, one_of, optional, share, text, whole_number

SCHEMA = 2
"""Version of the document; a later medpeft reads all earlier ones. Options by place came with 2."""

KEY = "medpeft"
"""Name of the document in the file's `__metadata__`."""

_BASE_TEXTS = ("class", "module", "architecture", "tag", "shapes", "values")
_FIELDS = {
    "medpeft": text,
    "methods": by_name(fields({})),
    "sites": list_of(list_of(text, lengths=(3,))),
    "selected": by_name(text),
    "head": list_of(text),
    "batchnorm": one_of(*get_args(BatchNormPolicy)),
    "statistics": list_of(text),
    "dtype": optional(one_of(*map(short, DTYPES))),
    "seed": whole_number,
    "depth": share,
    "input": optional(fields({})),
    "base": fields({**dict.fromkeys(_BASE_TEXTS, text), "tensors": by_name(text)}),
    "metadata": fields({"classes": optional(list_of(text))}),
    "content": text,
}

_DEFAULTS: dict[str, Any] = {"depth": 1.0}
"""Values of fields that files of earlier versions do not have. A new field goes here and into `_FIELDS`."""


@dataclass(frozen=True)
class Header:
    """Header of a checkpoint. Print it.

    Attributes:
        name: Name of the file.
        document: Methods, sites, selected parameters, head, BatchNorm policy, base, metadata, version.
        layout: The tensors in the file.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "lora", rank=2, target="0", head="1")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     medpeft.save(model, f"{folder}/a.safetensors", metadata={"classes": ["benign", "malignant"]})
        ...     header = medpeft.inspect(f"{folder}/a.safetensors")
        >>> header.methods["lora"]["rank"], header.classes
        (2, ['benign', 'malignant'])
        >>> header.tensors["1.bias"].shape
        (2,)
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
        return dict(self.document["methods"])

    @property
    def metadata(self) -> dict[str, Any]:
        """The `metadata` given to `save`."""
        return dict(self.document["metadata"])

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes, None if `metadata` had none."""
        return self.metadata.get("classes")

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(math.prod(entry.shape) for entry in self.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON."""
        tensors = {}
        for name, entry in self.tensors.items():
            tensors[name] = {"dtype": short(entry.dtype), "shape": list(entry.shape)}
        return {"file": self.name, **self.document, "tensors": tensors}

    def __str__(self) -> str:
        lines = [f"{self.name}: {'+'.join(self.methods)}"]
        for name, value in self._summary().items():
            if value:
                lines.append(f"  {name:<11}{value}".replace("\n", "\n" + " " * 13))
        return printable("\n".join(lines))

    def _summary(self) -> dict[str, str]:
        """The lines of the printed header by name; an empty one is not printed."""
        document = self.document
        size = sum(entry.bytes for entry in self.tensors.values())
        layers = dict.fromkeys(layer for _, layer, _ in document["sites"])
        described = []
        for name, options in self.methods.items():
            described.append(f"{name}({_pairs(_shown(name, options), '=', ', ')})")
        depth = ""
        if document["depth"] < 1:
            depth = f"the last {document['depth']:g} of the blocks"
        metadata = self.metadata
        metadata.pop("classes", None)
        return {
            "methods": "\n".join(described),
            "tensors": f"{len(self.tensors)}, {self.parameters:,} elements, {size:,} bytes",
            "layers": _counted(layers),
            "selected": _counted(document["selected"]),
            "head": ", ".join(document["head"]) or "none",
            "classes": _few(self.classes or []),
            "depth": depth,
            "BatchNorm": document["batchnorm"],
            "base": f"{label(document['base'])}, values {document['base']['values']}",
            "input": _pairs(document["input"] or {}, "=", ", "),
            "metadata": _pairs(metadata, ": ", "\n"),
            "written by": f"medpeft {document['medpeft']}, schema {document['schema']}",
        }


def _shown(method: str, options: Mapping[str, Any]) -> dict[str, str]:
    """Write the options of a method, those by place by their values; of an unknown method all as they are."""
    by_place: list[str] = []
    if method in methods():
        by_place = find(method).by_place(options)
    texts = {}
    for option, value in options.items():
        texts[option] = shown(value)
        if option in by_place:
            texts[option] = f"[{shown(ByPlace(value))}]"
    return texts


def _pairs(values: Mapping[str, Any], between: str, after: str) -> str:
    return after.join(f"{name}{between}{value}" for name, value in values.items())


def _counted(names: Mapping[str, Any]) -> str:
    if not names:
        return ""
    return f"{len(names)}: {_few(names)}"


def _few(names: Iterable[str], most: int = 4) -> str:
    shown = list(names)
    if len(shown) > most:
        shown[most:] = ["…"]
    return ", ".join(shown)


def schema_of(options_by_method: Mapping[str, Mapping[str, Any]]) -> int:
    """Return the first schema that can say these options: an earlier medpeft reads what it can."""
    for options in options_by_method.values():
        if any(isinstance(value, ByPlace) for value in options.values()):
            return 2
    return 1


def compose(document: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the document as the header's text, with digests of the tensors and of itself."""
    signed = {**document, "content": content_digest(tensors)}
    return json.dumps({**signed, "digest": _digest(signed)}, allow_nan=False, separators=(",", ":"))


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, dtypes, shapes and bytes; one tensor after the other comes to CPU memory."""
    described = []
    for name, tensor in sorted(tensors.items()):
        data = memory(tensor.detach().cpu().contiguous())
        described.append([name, short(tensor.dtype), list(tensor.shape), digest(data)])
    return _digest(described)


def _digest(value: Any) -> str:
    """Digest of JSON, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def read(file: io.BufferedIOBase, name: str) -> Header:
    """Read and check the header of an open file; the tensors' bytes are not read.

    Raises:
        CheckpointError: this is no file of medpeft's, it was altered or cut off, or a later version wrote it.
    """
    layout = read_layout(file, name)
    if KEY not in layout.metadata:
        raise CheckpointError(
            f"{name} was not written by medpeft.save: its header has no {KEY!r} entry. For LoRA files of "
            f"peft or diffusers there are medpeft.interchange.from_peft and from_diffusers."
        )
    return Header(name, _document(name, layout.metadata[KEY]), layout)


def _document(name: str, content: str) -> dict[str, Any]:
    """Read the document, checked against its digest and its fields."""
    document = parse(content, f"what medpeft wrote in {name}")
    if not isinstance(document, dict) or not whole_number(document.get("schema")) or document["schema"] < 1:
        raise CheckpointError(f"{name} does not say by which schema it was written: it was altered.")
    schema = document["schema"]
    if schema > SCHEMA:
        raise CheckpointError(
            f"{name} has schema {clip(schema)}, this medpeft reads up to {SCHEMA}: install a later medpeft."
        )
    written = document.pop("digest", None)
    if written != _digest(document):
        raise CheckpointError(f"{name} was altered: its header is not what medpeft wrote.")
    document = {**_DEFAULTS, **document}
    for field, accepts in _FIELDS.items():
        if field not in document or not accepts(document[field]):
            raise CheckpointError(f"{name}: its header has no valid {field!r} entry.")
    return dict(document)


def read_values(file: io.BufferedIOBase, header: Header) -> dict[str, Tensor]:
    """Read every tensor of an open file, on the CPU, and check them against the digest in the header.

    Raises:
        CheckpointError: the tensors are not those that were written.
    """
    tensors = read_tensors(file, header.layout, header.name)
    if content_digest(tensors) != header.document["content"]:
        raise CheckpointError(f"{header.name} was altered: its tensors are not those that medpeft wrote.")
    return tensors
