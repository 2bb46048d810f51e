"""A labelled set of images: first as rows that name them, then with their pixels."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
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
        table: a row an image. `item` is what `images.load` reads, `name` how the source names it, `label` its
            class; where the source tells, `part` ("train", "val" or "test"), `patient` (whose images stay
            together) and `group` (of patients, such as their sex).
        notes: lines for the user.
    """

    table: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[str]:
        """Give a column, empty where there is none."""
        return list(self.table.get(name, []))


@dataclass
class Images:
    """A labelled set of images.

    Attributes:
        pixels: (N, C, H, W) or (N, C, D, H, W), uint8; C is 1 (grey) or 3 (RGB).
        labels: (N,), positions in `classes`.
        classes: the names of the classes, in a fixed order.
        groups: (N,), images with one number never fall into different parts of a split.
        parts: (N,), "train", "val" or "test" where the data bring their own split, else empty.
        names: of the N images.
        subgroups: of the N patients, empty where they are not asked for.
        broken: what is wrong with each image that was left out.
        notes: lines for the user.
    """

    pixels: Tensor
    labels: Integers
    classes: list[str]
    groups: Integers
    parts: npt.NDArray[np.str_]
    names: list[str]
    subgroups: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def read_images(rows: Rows, size: int, skip_broken: bool = False) -> Images:
    """Read the images that rows name.

    Raises:
        TrainerError: the classes make no sense, or images cannot be read.
    """
    check_classes(rows.column("label"))
    loaded = load(rows.column("item"), size, skip_broken=skip_broken)
    kept = Rows(rows.table.iloc[loaded.rows])
    named = kept.column("patient") or loaded.digests
    in_files = [patient or f"image {row}" for row, patient in enumerate(loaded.patients)]
    labels, classes = number_classes(kept.column("label"))
    names, notes = kept.column("name"), list(rows.notes)
    blank = np.flatnonzero(loaded.blank)
    if len(blank):
        notes.append(f"{len(blank)} images are blank, of one value everywhere; the first: {names[blank[0]]}")
    return Images(
        loaded.pixels,
        labels,
        classes,
        join_groups(loaded.digests, in_files, named),
        np.array(kept.column("part"), dtype=np.str_),
        names,
        kept.column("group"),
        loaded.broken,
        notes,
    )


def number_classes(names: Sequence[str]) -> tuple[Integers, list[str]]:
    """Give each name's number (N,), and the distinct names in order; numbers keep theirs, 2 before 10."""
    classes = sorted(set(names))
    with suppress(ValueError):
        classes = sorted(classes, key=float)
    return np.array([classes.index(name) for name in names], dtype=np.int64), classes


def check_classes(names: Sequence[str]) -> None:
    """Check that every class is spelled in one way, that none is several, and that there are two.

    Raises:
        TrainerError: it is not so.
    """
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        spellings[_plain(name)].append(name)
        if "|" in name:
            raise TrainerError(
                f"The label '{name}' names several classes, and this trainer takes one class for each image."
            )
    for several in spellings.values():
        if len(several) > 1:
            raise TrainerError(
                f"The classes '{several[0]}' and '{several[1]}' differ in spelling alone. If they are one, "
                "write them alike; if not, name them apart."
            )
    if len(spellings) < 2:
        raise TrainerError(f"The data have only the class '{names[0]}'. At least two are needed.")


def name_parts(names: Sequence[str], source: object) -> list[str]:
    """Turn valid, testing and the like into val, test, train; raise a TrainerError for anything else."""
    parts = []
    for name in names:
        if name.strip().lower() not in PARTS:
            raise TrainerError(f"{source} has the split '{name}'. Use train, val and test.")
        parts.append(PARTS[name.strip().lower()])
    return parts


def _plain(name: str) -> str:
    """Write a name without what people spell differently: case, blanks, underscores, `1.0` for `1`."""
    try:
        return str(float(name))
    except ValueError:
        return "".join(name.casefold().replace("_", " ").replace("-", " ").split())
