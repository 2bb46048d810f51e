"""The shown scores of one label for many draws of the images at once, as a bootstrap asks for them.

A draw says how often each image counts: `counts` is (D, N), for D draws of N images, and each score is (D,).
They equal those of `scores.py` for images that are repeated so, to which a test holds them.
"""

import math

import numpy as np
import numpy.typing as npt

from .scores import BINS

Floats = npt.NDArray[np.floating]
Flags = npt.NDArray[np.bool_]
Whole = npt.NDArray[np.int64]


def shown_scores(probabilities: Floats, labels: Whole, counts: Floats) -> dict[str, Floats]:
    """Give the scores that are shown, of probabilities (N, C) and labels (N,)."""
    classes = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    confusion = confusion_of(predicted, labels, classes, counts)
    right, support = confusion.diagonal(axis1=1, axis2=2), confusion.sum(2)
    aurocs, precisions = [], []
    for place in range(classes):
        aurocs.append(auroc(probabilities[:, place], labels == place, counts))
        precisions.append(average_precision(probabilities[:, place], labels == place, counts))
    return {
        "macro_f1": macro_f1(confusion),
        "balanced_accuracy": _mean_where(right, support),
        "auroc": np.mean(aurocs, axis=0),
        "average_precision": np.mean(precisions, axis=0),
        "mcc": _matthews(confusion),
        "calibration_error": _calibration_error(probabilities, predicted == labels, counts),
    }


def auroc(scores: Floats, positive: Flags, counts: Floats) -> Floats:
    """Give the area under the ROC curve by trapezoids; NaN where nothing or everything is positive."""
    found, false = _rising(scores, positive, counts)
    heights = (found[:, 1:] + found[:, :-1]) / 2
    area = (heights * np.diff(false, axis=1)).sum(1)
    return _or_nan(area, found[:, -1] * false[:, -1], scores)


def average_precision(scores: Floats, positive: Flags, counts: Floats) -> Floats:
    """Give the precision, meaned over the steps of the recall; NaN where the AUROC is."""
    found, false = _rising(scores, positive, counts)
    precision = found[:, 1:] / np.maximum(found[:, 1:] + false[:, 1:], 1)
    area = (precision * np.diff(found, axis=1)).sum(1)
    defined = found[:, -1] * (false[:, -1] > 0)
    return _or_nan(area, defined, scores)


def macro_f1(confusion: npt.ArrayLike) -> Floats:
    """Average the F1 of the classes that occur, among the true labels or the predictions.

    Args:
        confusion: (..., C, C) counts, rows true and columns predicted.

    Returns:
        (...), NaN where there are no counts at all.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(-1) + counts.sum(-2)
    f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    occurring = (either > 0).sum(-1)
    mean: Floats = np.divide(f1.sum(-1), occurring, out=np.full(occurring.shape, np.nan), where=occurring > 0)
    return mean


def share(of: Flags, among: Flags, counts: Floats) -> Floats:
    """Give the share of some images among others, NaN where there are none."""
    total = counts @ among
    return np.where(total > 0, counts @ (of & among) / np.maximum(total, 1), math.nan)


def _rising(scores: Floats, positive: Flags, counts: Floats) -> tuple[Floats, Floats]:
    """Count the true and false positives (D, T + 1) while the threshold falls over T distinct scores."""
    order = np.argsort(-scores, kind="stable")
    # Of equal scores, only the last is a threshold.
    last = np.append(np.diff(scores[order]) != 0, True)
    drawn, hits = counts[:, order], positive[order]
    found = (drawn * hits).cumsum(1)[:, last]
    false = (drawn * ~hits).cumsum(1)[:, last]
    start = np.zeros((len(counts), 1))
    return np.hstack([start, found]), np.hstack([start, false])


def _or_nan(area: Floats, defined: Floats, scores: Floats) -> Floats:
    if not np.isfinite(scores).all():
        return np.full(len(area), math.nan)
    return np.where(defined > 0, area / np.maximum(defined, 1), math.nan)


def confusion_of(predicted: Whole, labels: Whole, classes: int, counts: Floats) -> Floats:
    """Count (D, C, C), rows true and columns predicted."""
    cells = np.zeros((len(labels), classes**2))
    cells[np.arange(len(labels)), classes * labels + predicted] = 1
    # (D, C²) → (D, C, C)
    return (counts @ cells).reshape(-1, classes, classes)


def _mean_where(parts: Floats, wholes: Floats) -> Floats:
    """Average parts / wholes (D, C) over the classes that are there."""
    there = wholes > 0
    ratios = np.where(there, parts / np.maximum(wholes, 1), 0)
    return np.asarray(ratios.sum(1) / np.maximum(there.sum(1), 1))


def _matthews(confusion: Floats) -> Floats:
    """Give Matthews' correlation of several classes, 0 where it is undefined."""
    total, right = confusion.sum((1, 2)), confusion.trace(axis1=1, axis2=2)
    truth, named = confusion.sum(2), confusion.sum(1)
    spread = (total**2 - (truth**2).sum(1)) * (total**2 - (named**2).sum(1))
    above = right * total - (truth * named).sum(1)
    return np.where(spread > 0, above / np.sqrt(np.maximum(spread, 1)), 0.0)


def _calibration_error(probabilities: Floats, right: Flags, counts: Floats) -> Floats:
    """Give the gap between confidence and accuracy, weighted over bins of the confidence."""
    confidence = probabilities.max(1)
    if not np.isfinite(confidence).all():
        return np.full(len(counts), math.nan)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.zeros((len(bins), BINS))
    gaps[np.arange(len(bins)), bins] = confidence - right
    return np.asarray(np.abs(counts @ gaps).sum(1) / counts.sum(1))
