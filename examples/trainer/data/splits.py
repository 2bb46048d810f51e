"""Train, validation and test parts that keep each class's share and never divide a group."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from sklearn.model_selection import StratifiedGroupKFold

from ..errors import TrainerError
from ..files.images import Integers

if TYPE_CHECKING:
    from ..settings import Settings
    from .rows import Images

NAMES = ("train", "val", "test")
FOLDS = 20  # each is 5 % of the data: fine enough for the usual fractions


def split(images: Images, settings: Settings) -> dict[str, Integers]:
    """Give the positions of the images in each part.

    A split that the data bring is kept; only a missing validation part is taken out of training.

    Raises:
        TrainerError: a class is too rare, or a part would be empty.
    """
    divide = _shared_out
    if settings.k_folds:
        divide = _folded
    found = divide(images, settings)
    for part in NAMES:
        if len(found[part]) == 0:
            raise TrainerError(
                f"The data's own split has no '{part}' images. Mark some, or leave the split out."
            )
    unseen = sorted(set(images.strata.tolist()) - set(images.strata[found["train"]].tolist()))
    if unseen:
        raise TrainerError(
            f"Class '{images.stratum_names[unseen[0]]}' has no training image in this split. "
            "Try another --seed, or add images."
        )
    found["train"] = training_subset(images, found["train"], settings.train_fraction, settings.seed)
    return {part: found[part] for part in NAMES}


def _shared_out(images: Images, settings: Settings) -> dict[str, Integers]:
    everything = np.arange(len(images))
    shares = {"test": settings.test_fraction or 0.2, "val": settings.val_fraction}
    if not len(images.parts):
        return _draw(images, everything, shares, settings.seed)
    found = {part: everything[images.parts == part] for part in NAMES}
    if len(found["val"]) == 0 and len(found["train"]) > 0:
        found |= _draw(images, found["train"], {"val": settings.val_fraction}, settings.seed)
    return found


def _folded(images: Images, settings: Settings) -> dict[str, Integers]:
    """Give the parts of one fold of a cross-validation: over all its folds, every image is tested once."""
    folds, number = settings.k_folds, settings.fold
    if len(images.parts):
        raise TrainerError(
            "The data bring their own split, which --k-folds would mix up. Leave one of the two out."
        )
    rarest, members = _rarest_class(images.strata, images.groups)
    if members < folds or members < 3:
        raise TrainerError(
            f"Class '{images.stratum_names[rarest]}' has {members} independent images (copies and images of "
            f"one patient count once), and --k-folds {folds} needs {max(folds, 3)}."
        )
    fold_of = _folds(images.strata, images.groups, folds, settings.seed)
    rest = np.flatnonzero(fold_of != number)
    share = settings.val_fraction * len(images) / len(rest)
    found = _draw(images, rest, {"val": share}, settings.seed)
    return found | {"test": np.flatnonzero(fold_of == number)}


def training_subset(images: Images, rows: Integers, fraction: float, seed: int) -> Integers:
    """Keep a share of some rows.

    Each class's groups stand in an order that the seed alone decides; the first of them are taken until the
    class has its share, rounded up. So one seed's 10 % lies within its 25 %. A group that holds several
    classes counts for each.
    """
    if fraction == 1:
        return rows
    groups, labels = images.groups[rows], images.strata[rows]
    numbers, place = np.unique(groups, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(numbers))[place]
    chosen: set[int] = set()
    for label in np.unique(labels):
        of_class = labels == label
        members = groups[of_class][np.argsort(rank[of_class], kind="stable")]
        # Ordered image by image, so the group of the last image that is needed ends the share.
        chosen |= set(members[: int(np.ceil(fraction * len(members) - 1e-9))].tolist())
    kept: Integers = rows[np.isin(groups, list(chosen))]
    return kept


def divided_groups(images: Images, found: dict[str, Integers]) -> int:
    """Count the groups that a split divides: possible only where the data bring their own."""
    inside = [set(images.groups[where].tolist()) for where in found.values()]
    return sum(map(len, inside)) - len(set().union(*inside))


def join_groups(*columns: Sequence[Hashable]) -> Integers:
    """Number the groups of rows that share a value in any column, directly or through others.

    A patient with two images and a copy of one of them under another name make one group.
    """
    count = len(columns[0])
    rows: list[int] = []
    others: list[int] = []
    for column in columns:
        first: dict[Hashable, int] = {}
        for row, value in enumerate(column):
            rows.append(row)
            others.append(first.setdefault(value, row))
    edges = coo_array((np.ones(len(rows)), (rows, others)), shape=(count, count))
    numbers = connected_components(edges, directed=False)[1]
    # By their first rows, so that the numbers do not depend on how they were found.
    return np.unique(_first_rows(numbers), return_inverse=True)[1].astype(np.int64)


def merge_rare(strata: Integers, groups: Integers) -> Integers:
    """Let strata that are found in too few groups for a share in every part join the largest one."""
    groups_of = [len(np.unique(groups[strata == stratum])) for stratum in range(strata.max() + 1)]
    rare = np.flatnonzero(np.array(groups_of) < FOLDS)
    merged = strata.copy()
    merged[np.isin(strata, rare)] = np.bincount(strata).argmax()
    return merged


def _first_rows(numbers: Integers) -> Integers:
    _, first, place = np.unique(numbers, return_index=True, return_inverse=True)
    return first[place].astype(np.int64)


def _draw(images: Images, rows: Integers, shares: dict[str, float], seed: int) -> dict[str, Integers]:
    """Draw parts out of some rows; what is left is the training part."""
    labels, groups = images.strata[rows], images.groups[rows]
    rarest, members = _rarest_class(labels, groups)
    if members <= len(shares):
        raise TrainerError(
            f"Class '{images.stratum_names[rarest]}' has {members} independent images (copies and "
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
