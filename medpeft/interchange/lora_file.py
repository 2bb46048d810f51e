"""The file of another library: the change that it makes to each layer, and its other tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..checkpoint.file import read_layout, read_tensors
from ..checkpoint.messages import clip
from ..checkpoint.source import opened
from ..errors import CheckpointError
from .changes import MERGE_THERE, PARTS, Change, make_change

Scale = Callable[[str, int, float | None], float]
"""Computes the factor of a change from the name of its layer, its rank (0 for none) and the file's α."""

# Pieces of keys by which other layouts are recognised.
_FOREIGN = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".ia3_l": "(IA)³",
    ".on_input": "(IA)³",
    ".vera_": "VeRA",
    ".a1.": "GLoRA",
    ".b1.": "GLoRA",
    ".q_layer.": "T-LoRA",
    ".bias_indices": "differences of biases",
    ".w_norm": "trained norms",
    ".b_norm": "trained norms",
    ".lora": "a LoRA",
    "_lora.": "a LoRA",
    ".hada_": "a LoHa",
    ".lokr_": "a LoKr",
}
_DIFFERENCES = ("diff", "diff_b")
"""Last words of keys of whole differences; a head may have a name with such a word in it."""

_NEEDED = "lora_A.weight and lora_B.weight (lora_down, lora_up)"


@dataclass(frozen=True)
class LoRAFile:
    """A file in the names of the model.

    Attributes:
        name: Path of the file, for messages.
        changes: LoRA, LoHa or LoKr by name of the layer.
        others: Every other tensor, by its name in the model; those of a trained head.
    """

    name: str
    changes: dict[str, Change]
    others: dict[str, Tensor]


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors by name, and the texts beside them.

    Raises:
        CheckpointError: it is damaged, or a value is not finite.
    """
    with opened(path) as file:
        layout = read_layout(file, path)
        tensors = read_tensors(file, layout, path)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.itemsize == 1:
            tensors[key] = tensor.float()  # torch computes nothing in 8 bits.
        if not torch.isfinite(tensors[key]).all():
            raise CheckpointError(f"{path} holds values in {clip(key)!r} that are not finite.")
    return tensors, layout.metadata


def sort(path: str, tensors: Mapping[str, Tensor], scale: Scale, methods: tuple[str, ...]) -> LoRAFile:
    """Sort tensors into the change of every layer, and the others.

    Args:
        path: The file, for messages.
        tensors: Its tensors, by names that begin with that of a layer.
        scale: Computes the factor of a change.
        methods: Those that the file may hold.

    Raises:
        CheckpointError: there is no change, a part of one is missing or no matrix, or another tensor belongs
            to a method that medpeft does not read.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        layer, part = _taken_apart(key)
        if not part or (part == "alpha" and not _has_change(layer, tensors)):
            others[key] = tensor
        elif part in parts.setdefault(layer, {}):
            raise CheckpointError(f"{path} holds {part} of {clip(layer)!r} twice, by two spellings.")
        else:
            parts[layer][part] = tensor
    for key in others:
        _require_known(path, key)
    if not parts:
        shown = clip(next(iter(others), "nothing"))
        raise CheckpointError(f"{path} holds {shown!r}, which is no pair of {_NEEDED}.")
    changes = {}
    for layer, found in parts.items():
        change = make_change(f"{path}: {clip(layer)!r}", found, partial(scale, layer))
        changes[layer] = change
        if change.method not in methods:
            raise CheckpointError(
                f"{path} holds {change.method} of {clip(layer)!r}, not {' or '.join(methods)}."
            )
    return LoRAFile(path, changes, others)


def _taken_apart(key: str) -> tuple[str, str]:
    """Split a key into a layer and the part of its change; the part is "" for any other tensor."""
    for pieces in (3, 2, 1):
        words = key.rsplit(".", pieces)
        part = PARTS.get(".".join(words[1:]))
        if len(words) > pieces and part is not None:
            return words[0], part
    return key, ""


def _has_change(layer: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file changes a layer; else its "alpha" is a parameter of the model that has this name."""
    return any(f"{layer}.{suffix}" in tensors for suffix in PARTS if not suffix.endswith("alpha"))


def _require_known(path: str, key: str) -> None:
    """Refuse a tensor of a method that medpeft does not read."""
    found = [layout for piece, layout in _FOREIGN.items() if piece in key]
    if key.rpartition(".")[2] in _DIFFERENCES:
        found.append("whole differences of weights")
    if found:
        raise CheckpointError(
            f"{path} holds {clip(key)!r}, which is no pair of {_NEEDED}, no LoHa and no LoKr, but part "
            f"of {found[0]}. {MERGE_THERE}"
        )
