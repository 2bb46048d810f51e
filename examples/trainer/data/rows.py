"""A labelled set of images: first as rows that name them, then with their pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from torch import Tensor

from ..errors import TrainerError
from ..files.images import Integers, load
from ..settings import Settings
from ..tasks import TASKS
from .splits import join_groups, merge_rare

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
        targets: (N, …), what is learned about each; of one label a position in `classes`.
        classes: the names of the model's outputs, in a fixed order: of the classes, if there is one label.
        strata: (N,), positions in `stratum_names`: each keeps its share in every part of a split.
        groups: (N,), images with one number never fall into different parts of a split.
        parts: (N,), "train", "val" or "test" where the data bring their own split, else empty.
        names: of the N images.
        subgroups: of the N patients, empty where they are not asked for.
        broken: what is wrong with each image that was left out.
        notes: lines for the user.
        details: what the task has to know besides the classes.
    """

    pixels: Tensor
    targets: Any
    classes: list[str]
    strata: Integers
    stratum_names: list[str]
    groups: Integers
    parts: npt.NDArray[np.str_]
    names: list[str]
    subgroups: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.strata)


def read_images(rows: Rows, settings: Settings) -> Images:
    """Read the images that rows name, and what is to be learned about them.

    Raises:
        TrainerError: the labels make no sense, or images cannot be read.
    """
    task = TASKS[settings.task]
    task.check(rows.table, settings)
    loaded = load(rows.column("item"), settings.image_size, skip_broken=settings.skip_broken)
    kept = Rows(rows.table.iloc[loaded.rows].assign(shape=pd.Series(loaded.shapes, loaded.rows)))
    targets = task.read(kept.table, loaded.pixels.shape[2:], settings)
    if targets.kept is not None:
        loaded, kept = loaded.only(targets.kept), Rows(kept.table.iloc[targets.kept])
    named = kept.column("patient") or loaded.digests
    in_files = [patient or f"image {row}" for row, patient in enumerate(loaded.patients)]
    groups = join_groups(loaded.digests, in_files, named)
    strata = targets.strata if targets.exact else merge_rare(targets.strata, groups)
    names, notes = kept.column("name"), rows.notes + targets.notes
    blank = np.flatnonzero(loaded.blank)
    if len(blank):
        notes.append(f"{len(blank)} images are blank, of one value everywhere; the first: {names[blank[0]]}")
    return Images(
        loaded.pixels,
        targets.values,
        targets.names,
        strata,
        targets.stratum_names,
        groups,
        np.array(kept.column("part"), dtype=np.str_),
        names,
        kept.column("group"),
        loaded.broken + targets.broken,
        notes,
        targets.details,
    )


def name_parts(names: Sequence[str], source: object) -> list[str]:
    """Turn valid, testing and the like into val, test, train; raise a TrainerError for anything else."""
    parts = []
    for name in names:
        if name.strip().lower() not in PARTS:
            raise TrainerError(f"{source} has the split '{name}'. Use train, val and test.")
        parts.append(PARTS[name.strip().lower()])
    return parts
