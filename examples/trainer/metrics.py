"""Test scores that stay honest on small and unbalanced data."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
)

BINS = 15  # of the calibration error, as in Guo et al., On calibration of modern neural networks, 2017


def macro_f1(probabilities: Tensor, labels: Tensor) -> float:
    """Average the F1 of the classes.

    Args:
        probabilities: (N, C).
        labels: (N,).
    """
    score = multiclass_f1_score(
        probabilities.argmax(1), labels, num_classes=probabilities.shape[1], average="macro"
    )
    return float(score)


def score(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Score predictions.

    Args:
        probabilities: (N, C).
        labels: (N,).

    Returns:
        `macro_f1`; `balanced_accuracy`, the mean recall of the classes that occur; `auroc`, macro
        one against the rest, NaN where a class has none or nothing but positives, with the
        number of such classes in `auroc_undefined_classes`; `auroc_per_class`;
        `average_precision`, macro one against the rest, NaN like `auroc`; `mcc`, Matthews' correlation
        coefficient; `ece`, the expected calibration error over 15 bins of the confidence;
        `confusion_matrix`, rows true and columns predicted.
    """
    classes = probabilities.shape[1]
    confusion = multiclass_confusion_matrix(probabilities.argmax(1), labels, num_classes=classes)
    per_class = [_auroc(probabilities[:, i], labels == i) for i in range(classes)]
    precisions = [_average_precision(probabilities[:, i], labels == i) for i in range(classes)]
    return {
        "macro_f1": macro_f1(probabilities, labels),
        "balanced_accuracy": _balanced_accuracy(confusion),
        "auroc": sum(per_class) / classes,
        "auroc_undefined_classes": sum(map(math.isnan, per_class)),
        "auroc_per_class": per_class,
        "average_precision": sum(precisions) / classes,
        "mcc": float(multiclass_matthews_corrcoef(probabilities.argmax(1), labels, num_classes=classes)),
        "ece": _calibration_error(probabilities, labels),
        "confusion_matrix": confusion.tolist(),
    }


def score_subgroups(
    probabilities: Tensor, labels: Tensor, subgroups: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Score each subgroup of patients by itself, with the number of its images in `images`.

    Args:
        probabilities: (N, C).
        labels: (N,).
        subgroups: of the N images.
    """
    found = {}
    for name in sorted(set(subgroups)):
        rows = torch.tensor([subgroup == name for subgroup in subgroups])
        found[name] = {"images": int(rows.sum()), **score(probabilities[rows], labels[rows])}
    return found


def subgroup_table(found: dict[str, dict[str, Any]]) -> str:
    """Lay out the scores of subgroups."""
    shown = ("macro_f1", "balanced_accuracy", "auroc", "ece")
    width = max(len("subgroup"), *map(len, found))
    lines = [f"{'subgroup':<{width}}  {'images':>6}" + "".join(f"  {name:>17}" for name in shown)]
    for name, scores in found.items():
        lines.append(
            f"{name:<{width}}  {scores['images']:>6}" + "".join(f"  {scores[key]:>17.4f}" for key in shown)
        )
    return "\n".join(lines)


def table(scores: dict[str, Any], classes: list[str], title: str) -> str:
    """Lay out the scores and the confusion matrix in aligned columns."""
    undefined = scores["auroc_undefined_classes"]
    note = f"  (undefined for {undefined} of {len(classes)} classes)" if undefined else ""
    lines = [
        title,
        f"  {'macro-F1':<20}{scores['macro_f1']:.4f}",
        f"  {'balanced accuracy':<20}{scores['balanced_accuracy']:.4f}",
        f"  {'AUROC, one vs rest':<20}{scores['auroc']:.4f}{note}",
        f"  {'average precision':<20}{scores['average_precision']:.4f}",
        f"  {'MCC':<20}{scores['mcc']:.4f}",
        f"  {'calibration error':<20}{scores['ece']:.4f}",
        "",
        "Confusion matrix (rows true, columns predicted)",
    ]
    first = max(map(len, classes))
    widths = [max(len(name), 5) for name in classes]
    header = "  ".join(f"{name:>{w}}" for name, w in zip(classes, widths, strict=True))
    lines.append(f"  {'':<{first}}  {header}")
    for name, row in zip(classes, scores["confusion_matrix"], strict=True):
        cells = "  ".join(f"{count:>{w}}" for count, w in zip(row, widths, strict=True))
        lines.append(f"  {name:<{first}}  {cells}")
    return "\n".join(lines)


def without_nan(value: Any) -> Any:
    """Replace NaN by None at any depth: JSON has no NaN, and strict readers refuse it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _auroc(scores: Tensor, positive: Tensor) -> float:
    return float(binary_auroc(scores, positive.long())) if _defined(scores, positive) else math.nan


def _average_precision(scores: Tensor, positive: Tensor) -> float:
    return (
        float(binary_average_precision(scores, positive.long())) if _defined(scores, positive) else math.nan
    )


def _defined(scores: Tensor, positive: Tensor) -> bool:
    # torchmetrics answers 0 where a curve is undefined, which would read as a terrible model.
    return bool(positive.any() and not positive.all() and torch.isfinite(scores).all())


def _calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    if not torch.isfinite(probabilities).all():
        return math.nan
    return float(
        multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=BINS)
    )


def _balanced_accuracy(confusion: Tensor) -> float:
    support = confusion.sum(1)
    recall = confusion.diag()[support > 0] / support[support > 0]
    return float(recall.mean())
