"""Names of classes and findings: numbered, and refused where they are spelled in several ways."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from ..errors import TrainerError
from ..files.images import Integers


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
    for name in sorted(set(names)):
        if "|" in name:
            raise TrainerError(
                f"The label '{name}' names several findings, and --task classify takes one class for each "
                "image. Take --task multilabel."
            )
    check_spelling(names)
    if len(set(names)) < 2:
        raise TrainerError(f"The data have only the class '{names[0]}'. At least two are needed.")


def check_spelling(names: Sequence[str]) -> None:
    """Raise a TrainerError for two names that differ in nothing but case, blanks or the like."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        spellings[_plain(name)].append(name)
    for several in spellings.values():
        if len(several) > 1:
            raise TrainerError(
                f"The classes '{several[0]}' and '{several[1]}' differ in spelling alone. If they are one, "
                "write them alike; if not, name them apart."
            )


def _plain(name: str) -> str:
    """Write a name without what people spell differently: case, blanks, underscores, `1.0` for `1`."""
    try:
        return str(float(name))
    except ValueError:
        return "".join(name.casefold().replace("_", " ").replace("-", " ").split())
