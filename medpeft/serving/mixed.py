"""A batch in which each image has an adapter of its own, computed in as few forwards as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Base
from .entry import BankEntry
from .inputs import Inputs
from .joined import joined
from .kind import Kind
from .mirror import Mirror
from .rows import with_rows
from .trial import is_near, uncalled

_AT_ONCE = 16
"""Images that a CPU computes together: of more, the outputs of a layer no longer fit its caches."""

_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class Subset(NamedTuple):
    """Images of a batch that are computed in one forward.

    Attributes:
        numbers: Numbers of the images in the batch.
        entries: The adapter of each; None for the base.
    """

    numbers: list[int]
    entries: list[BankEntry | None]


def by_kind(entries: Sequence[BankEntry | None]) -> list[Subset]:
    """Divide a batch by the kinds of its adapters and the shapes of their heads."""
    subsets: dict[Any, Subset] = {}
    for number, entry in enumerate(entries):
        key: Any = None  # Of images with the base.
        if entry is not None:
            key = (entry.kind.key, entry.head_shapes())
        subset = subsets.setdefault(key, Subset([], []))
        subset.numbers.append(number)
        subset.entries.append(entry)
    return list(subsets.values())


def by_adapter(subset: Subset) -> list[Subset]:
    """Divide images of one kind by adapters."""
    subsets: dict[str, Subset] = {}
    for number, entry in zip(subset.numbers, subset.entries, strict=True):
        name = entry.name if entry is not None else ""
        one = subsets.setdefault(name, Subset([], []))
        one.numbers.append(number)
        one.entries.append(entry)
    return list(subsets.values())


def run_mixed(base: Base, entries: Sequence[BankEntry | None], inputs: Inputs) -> Any:
    """Compute each image with its adapter.

    Returns:
        What the model returns for the batch, or where shapes differ a list of what it returns for each image.
    """
    outputs: list[tuple[list[int], Any]] = []
    for subset in by_kind(entries):
        own = inputs.of(subset.numbers)
        groups = by_adapter(subset)
        first = subset.entries[0]
        if first is not None and len(groups) > 1 and _can_run_by_image(base, first, own):
            for portion in _portions(subset, inputs.x):
                output = _run_by_image(base, first.kind, portion.entries, inputs.of(portion.numbers))
                outputs.append((portion.numbers, output))
        else:
            for group in groups:
                output = _run_one(base, group.entries[0], inputs.of(group.numbers))
                outputs.append((group.numbers, output))
    return joined(outputs, len(entries))


def _portions(subset: Subset, x: Tensor) -> list[Subset]:
    """Divide images that are computed together into as many as a CPU does best at once; a GPU takes all."""
    step = len(subset.numbers)
    if x.device.type == "cpu":
        step = _AT_ONCE
    portions = []
    for start in range(0, len(subset.numbers), step):
        end = start + step
        portions.append(Subset(subset.numbers[start:end], subset.entries[start:end]))
    return portions


def _run_one(base: Base, entry: BankEntry | None, inputs: Inputs) -> Any:
    """Run images with one adapter."""
    if entry is None:
        return Mirror(base.replaced()).of(base.plain)(inputs.x, **inputs.others)
    mirror = Mirror(entry.kind.replaced(base, entry.values))
    return mirror.of(entry.kind.adapted_mirror)(inputs.x, **inputs.others)


def _can_run_by_image(base: Base, entry: BankEntry, inputs: Inputs) -> bool:
    """Whether images with adapters of one kind can be computed together; tried out once for each input."""
    kind, key = entry.kind, inputs.signature()
    if kind.layers is None:
        return False
    if key not in kind.tried:
        try:
            kind.tried[key] = _try_by_image(base, entry, inputs.of([0]))
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            return False  # Of this batch: the next one tries it again.
    return kind.tried[key]


def _lacks_memory(error: Exception) -> bool:
    """Whether an error says that there was no memory at the moment, in the words of torch's devices."""
    return any(words in str(error) for words in _NO_MEMORY)


def _try_by_image(base: Base, entry: BankEntry, one: Inputs) -> bool:
    """Whether every layer gets its rows image by image, and `torch.vmap` gives what the layers give."""
    kind = entry.kind
    names = [*(kind.layers or {}), *kind.head_modules]
    tensors = kind.replaced(base, entry.values)
    missed = uncalled(kind.adapted_mirror, tensors, names, one)
    if missed is None:
        return False
    # Whoever reads the tensors of a layer without calling it would get those of one adapter for all images.
    # So a layer that is not called gets NaN, which shows in the output if somebody reads its tensors.
    spoilt = dict(entry.values)
    for layer in missed:
        for name in (kind.layers or {}).get(layer, kind.heads):
            spoilt[name] = torch.full_like(spoilt[name], torch.nan)
    try:
        rows = _run_by_image(base, kind, [entry], one)
    except (RuntimeError, NotImplementedError) as error:
        if _lacks_memory(error):
            raise
        return False  # torch.vmap has no rule for some operation.
    alone = _run_one(base, entry, one)
    return is_near(rows, alone) and is_near(_run_one(base, replace(entry, values=spoilt), one), alone)


def _run_by_image(base: Base, kind: Kind, entries: Sequence[BankEntry | None], inputs: Inputs) -> Any:
    """Run images with adapters of one kind together."""
    values: list[Mapping[str, Tensor]] = []
    for entry in entries:
        assert entry is not None  # The base is no kind.
        values.append(entry.values)
    by_entry = []
    for group in by_adapter(Subset(list(range(len(entries))), list(entries))):
        numbers = torch.tensor(group.numbers, device=inputs.x.device)
        by_entry.append((numbers, kind.replaced(base, values[group.numbers[0]])))
    rows = {}
    for layer, names in (kind.layers or {}).items():
        stacked = {}
        for name in names:
            stacked[id(kind.tensors[name])] = torch.stack([of_image[name] for of_image in values])
        rows[layer] = stacked
    model = with_rows(kind.adapted_mirror, kind.replaced(base, {}), rows, kind.head_modules, by_entry)
    return model(inputs.x, **inputs.others)
