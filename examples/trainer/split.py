"""Train, validation and test parts that keep each class's share and never divide a group."""

from collections.abc import Hashable, Sequence

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from .errors import TrainerError
from .images import Images, Integers

PARTS = ("train", "val", "test")
FOLDS = 20  # each is 5 % of the data: fine enough for the usual fractions


def split(images: Images, seed: int, val: float = 0.15, test: float = 0.2) -> dict[str, Integers]:
    """Give the positions of the images in each part.

    A split that the data bring is kept; only a missing validation part is taken out of training.

    Args:
        images: the data; their `groups` are never divided.
        seed: the same seed gives the same split.
        val: the share of all images for validation, between 0 and 1.
        test: the share for the test.

    Raises:
        TrainerError: a class is too rare, or a part would be empty.
    """
    if not (0 < val < 1 and 0 < test < 1 and val + test < 1):
        raise TrainerError(
            f"--val-fraction {val} and --test-fraction {test} leave nothing to train on, or "
            "are not above 0. Their sum must stay below 1."
        )
    everything = np.arange(len(images))
    if images.parts is None:
        found = _draw(images, everything, {"test": test, "val": val}, seed)
    else:
        found = {part: everything[images.parts == part] for part in PARTS}
        if len(found["val"]) == 0 and len(found["train"]) > 0:
            found |= _draw(images, found["train"], {"val": val}, seed)
    _check(images, found)
    return found


def fold(images: Images, seed: int, folds: int, number: int, val: float = 0.15) -> dict[str, Integers]:
    """Give the parts of one fold of a cross-validation: over all its folds, every image is tested once.

    Args:
        images: the data, without a split of their own.
        seed: the same seed gives the same folds.
        folds: how many, at least 2.
        number: of the fold, from 0.
        val: the share of all images for validation, taken out of the other folds.

    Raises:
        TrainerError: the data are split already, or a class is too rare.
    """
    if images.parts is not None:
        raise TrainerError(
            "The data bring their own split, which --k-folds would mix up. Leave one of the two out."
        )
    rarest, members = _rarest_class(images.labels, images.groups)
    if members < folds or members < 3:
        raise TrainerError(
            f"Class '{images.classes[rarest]}' has {members} independent images (copies and images of one patient count "
            f"once), and --k-folds {folds} needs {max(folds, 3)}."
        )
    fold_of = _folds(images.labels, images.groups, folds, seed)
    rest = np.flatnonzero(fold_of != number)
    found = _draw(images, rest, {"val": val * len(images) / len(rest)}, seed)
    found["test"] = np.flatnonzero(fold_of == number)
    _check(images, found)
    return {part: found[part] for part in PARTS}


def divided_groups(images: Images, found: dict[str, Integers]) -> int:
    """Count the groups that a split divides: possible only where the data bring their own."""
    inside = [set(images.groups[where].tolist()) for where in found.values()]
    return sum(map(len, inside)) - len(set().union(*inside))


def join_groups(*columns: Sequence[Hashable]) -> Integers:
    """Number the groups of rows that share a value in any column, directly or through others.

    A patient with two images and a copy of one of them under another name make one group.
    """
    root = list(range(len(columns[0])))

    def find(row: int) -> int:
        while root[row] != row:
            root[row] = root[root[row]]
            row = root[row]
        return row

    for column in columns:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(column):
            root[find(row)] = find(first.setdefault(value, row))
    roots = [find(row) for row in range(len(root))]
    return np.unique(roots, return_inverse=True)[1].astype(np.int64)


def _draw(images: Images, rows: Integers, shares: dict[str, float], seed: int) -> dict[str, Integers]:
    """Draw parts out of some rows; what is left is the training part."""
    labels, groups = images.labels[rows], images.groups[rows]
    rarest, members = _rarest_class(labels, groups)
    if members <= len(shares):
        raise TrainerError(
            f"Class '{images.classes[rarest]}' has {members} independent images (copies and "
            f"images of one patient count once); a split needs {len(shares) + 1}. "
            "Add images, or leave the class out."
        )
    count = min(FOLDS, members)
    fold_of = _folds(labels, groups, count, seed)
    found: dict[str, Integers] = {}
    used = 0
    for i, (part, share) in enumerate(shares.items()):
        # Every later part, training among them, must get a fold too.
        take = min(max(1, round(share * count)), count - used - (len(shares) - i))
        found[part] = rows[(fold_of >= used) & (fold_of < used + take)]
        used += take
    return found | {"train": rows[fold_of >= used]}


def _folds(labels: Integers, groups: Integers, count: int, seed: int) -> Integers:
    fold_of = np.empty(len(labels), dtype=np.int64)
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    for number, (_, rows) in enumerate(folds.split(labels, labels, groups)):
        fold_of[rows] = number
    return fold_of


def _rarest_class(labels: Integers, groups: Integers) -> tuple[int, int]:
    """Give the class found in the fewest groups, and their number."""
    pairs = np.unique(np.stack([labels, groups]), axis=1)
    present, counts = np.unique(pairs[0], return_counts=True)
    return int(present[counts.argmin()]), int(counts.min())


def _check(images: Images, found: dict[str, Integers]) -> None:
    for part in PARTS:
        if len(found[part]) == 0:
            raise TrainerError(
                f"The data's own split has no '{part}' images. Mark some, or leave the split out."
            )
    seen = set(images.labels[found["train"]].tolist())
    unseen = [name for i, name in enumerate(images.classes) if i not in seen]
    if unseen:
        raise TrainerError(
            f"Class '{unseen[0]}' has no training image in this split. Try another --seed, or add images."
        )
