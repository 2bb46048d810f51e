"""One line an image: what it is, what it was taken for, and the probability of each class."""

import csv
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor


def write_predictions(
    path: Path,
    names: Sequence[str],
    classes: Sequence[str],
    probabilities: Tensor,
    labels: Sequence[str] | None = None,
) -> None:
    """Write a CSV with the columns `image`, `label` (where known), `predicted`, and one a class, `p(CLASS)`.

    Args:
        path: the file to write.
        names: of the N images.
        classes: the names of the C classes.
        probabilities: (N, C).
        labels: the true classes of the images.
    """
    known = ["label"] if labels is not None else []
    predicted = [classes[i] for i in probabilities.argmax(1).tolist()]
    with path.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.writer(opened)
        writer.writerow(["image", *known, "predicted", *(f"p({name})" for name in classes)])
        for i, row in enumerate(probabilities.tolist()):
            truth = [labels[i]] if labels is not None else []
            writer.writerow([names[i], *truth, predicted[i], *row])
