"""Part of the training data: every class by its share, no group divided, the smaller part within the larger."""

import numpy as np

from .images import Images, Integers


def training_subset(images: Images, rows: Integers, fraction: float, seed: int) -> Integers:
    """Keep a share of some rows.

    Each class's groups stand in an order that the seed alone decides; the first of them are taken until the class has its
    share, rounded up. So one seed's 10 % lies within its 25 %. A group that holds several classes counts for each.

    Args:
        images: the data.
        rows: positions to choose from.
        fraction: above 0, at most 1.
        seed: of the order.
    """
    if fraction == 1:
        return rows
    groups, labels = images.groups[rows], images.labels[rows]
    numbers = np.unique(groups)
    rank = dict(
        zip(numbers.tolist(), np.random.default_rng(seed).permutation(len(numbers)).tolist(), strict=True)
    )
    chosen: set[int] = set()
    for label in np.unique(labels):
        members = sorted(groups[labels == label].tolist(), key=rank.__getitem__)
        # Ordered image by image, so the group of the last image that is needed ends the share.
        chosen |= set(members[: int(np.ceil(fraction * len(members) - 1e-9))])
    kept: Integers = rows[np.isin(groups, list(chosen))]
    return kept
