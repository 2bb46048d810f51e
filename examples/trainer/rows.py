"""A labelled set of images: first as rows that name them, then with their pixels."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .errors import TrainerError
from .images import Integers, load
from .splits import join_groups

PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass
class Rows:
    """What a source says of its images, before one of them is read.

    Attributes:
        items: what `images.load` reads.
        names: as the source names them.
        labels: the names of their classes.
        parts: "train", "val" or "test" of each, where the source splits them.
        patients: of each, where the source tells; images of one stay together.
        groups: subgroups of patients, such as their sex, where they were asked for.
        notes: lines for the user.
    """

    items: list[Any]
    names: list[str]
    labels: list[str]
    parts: list[str] | None = None
    patients: list[str] | None = None
    groups: list[str] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Images:
    """A labelled set of images.

    Attributes:
        pixels: (N, C, H, W) or (N, C, D, H, W), uint8; C is 1 (grey) or 3 (RGB).
        labels: (N,), positions in `classes`.
        classes: the names of the classes, in a fixed order.
        groups: (N,), images with one number never fall into different parts of a split.
        parts: (N,), "train", "val" or "test" where the data bring their own split, else None.
        names: of the N images.
        subgroups: of the N patients, None where they are not asked for.
        broken: what is wrong with each image that was left out.
        notes: lines for the user.
    """

    pixels: Tensor
    labels: Integers
    classes: list[str]
    groups: Integers
    parts: npt.NDArray[np.str_] | None
    names: list[str]
    subgroups: list[str] | None = None
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def read_images(rows: Rows, size: int, skip_broken: bool = False) -> Images:
    """Read the images that rows name.

    Raises:
        TrainerError: the classes make no sense, or images cannot be read.
    """
    check_classes(rows.labels)
    loaded = load(rows.items, size, skip_broken=skip_broken)

    def kept(column: Sequence[str]) -> list[str]:
        return [column[i] for i in loaded.rows]

    keys: list[Sequence[str]] = [loaded.digests, _each_its_own(loaded.patients)]
    if rows.patients is not None:
        keys.append(kept(rows.patients))
    labels, classes = number_classes(kept(rows.labels))
    notes = list(rows.notes)
    blank = np.flatnonzero(loaded.blank)
    if len(blank):
        first = kept(rows.names)[blank[0]]
        notes.append(f"{len(blank)} images are blank, of one value everywhere; the first: {first}")
    return Images(
        loaded.pixels,
        labels,
        classes,
        join_groups(*keys),
        np.array(kept(rows.parts)) if rows.parts is not None else None,
        kept(rows.names),
        kept(rows.groups) if rows.groups is not None else None,
        loaded.broken,
        notes,
    )


def number_classes(names: Sequence[str]) -> tuple[Integers, list[str]]:
    """Give each name's number (N,), and the distinct names in order; numbers keep theirs, 2 before 10."""
    classes = sorted(set(names))
    with suppress(ValueError):
        classes = sorted(classes, key=float)
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[name] for name in names], dtype=np.int64), classes


def check_classes(names: Sequence[str]) -> None:
    """Raise a TrainerError where classes are spelled in several ways, hold several labels, or are only one."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        spellings[_plain(name)].append(name)
        if "|" in name:
            raise TrainerError(
                f"The label '{name}' names several classes, and this trainer takes one class for each image."
            )
    for several in spellings.values():
        if len(several) > 1:
            written = " and ".join(f"'{name}'" for name in several)
            raise TrainerError(
                f"The classes {written} differ in spelling alone. If they are one, write them alike; if not, name "
                "them apart."
            )
    if len(spellings) < 2:
        raise TrainerError(f"The data have only the class '{names[0]}'. At least two are needed.")


def name_parts(names: Sequence[str], source: object) -> list[str]:
    """Turn valid, testing and the like into val, test, train; raise a TrainerError for anything else."""
    unknown = sorted({name for name in names if name.strip().lower() not in PARTS})
    if unknown:
        raise TrainerError(f"{source} has the split '{unknown[0]}'. Use train, val and test.")
    return [PARTS[name.strip().lower()] for name in names]


def _plain(name: str) -> str:
    """Write a name without what people spell differently: case, blanks, underscores, `1.0` for `1`."""
    try:
        return str(float(name))
    except ValueError:
        return "".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _each_its_own(patients: Sequence[str]) -> list[str]:
    return [patient or f"image {row}" for row, patient in enumerate(patients)]
