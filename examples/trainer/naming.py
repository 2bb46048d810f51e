"""What data call their classes and parts, in the trainer's words."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .errors import TrainerError
from .images import Integers

PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def number_classes(names: Sequence[str]) -> tuple[Integers, list[str]]:
    """Give each name's number (N,), and the distinct names in order."""
    # Classes that are numbers keep their order: 2 before 10.
    numeric = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=(lambda name: (int(name), name)) if numeric else None)
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[name] for name in names], dtype=np.int64), classes


def name_parts(names: Sequence[str], source: object) -> npt.NDArray[np.str_]:
    """Turn valid, testing and the like into val, test, train; raise a TrainerError for anything else."""
    unknown = sorted({name for name in names if name.strip().lower() not in PART_NAMES})
    if unknown:
        raise TrainerError(f"{source} has the split '{unknown[0]}'. Use train, val and test.")
    return np.array([PART_NAMES[name.strip().lower()] for name in names])
