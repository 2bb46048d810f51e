"""Test scores that stay honest on small and unbalanced data."""

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from sklearn.metrics import classification_report
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_matthews_corrcoef,
    multiclass_specificity,
)

BINS = 15  # of the calibration error, as in Guo et al., On calibration of modern neural networks, 2017
SHOWN = {
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "auroc": "AUROC, one vs rest",
    "average_precision": "average precision",
    "mcc": "MCC",
    "calibration_error": "calibration error",
}

# Beyond these, a small validation part that is all right, or all wrong, would drive the temperature to 0 or
# infinity.
LOWEST, HIGHEST = 0.1, 10.0


def macro_f1(probabilities: Tensor, labels: Tensor) -> float:
    """Average the F1 of the classes, of probabilities or logits (N, C)."""
    count = probabilities.shape[1]
    return float(multiclass_f1_score(probabilities.argmax(1), labels, num_classes=count, average="macro"))


def score(probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Score predictions.

    Args:
        probabilities: (N, C).
        labels: (N,).

    Returns:
        `macro_f1`; `balanced_accuracy`, the mean recall of the classes that occur; `auroc`, macro one against
        the rest, NaN where a class has none or nothing but positives, with the number of such classes in
        `auroc_undefined_classes`; `auroc_per_class`; `average_precision`, macro one against the rest, NaN
        like `auroc`; `mcc`, Matthews' correlation; `calibration_error`, expected, over 15 bins;
        `recall_per_class`, the sensitivity; `specificity_per_class`; `precision_per_class`;
        `confusion_matrix`, rows true and columns predicted.
    """
    count = probabilities.shape[1]
    predicted = probabilities.argmax(1)
    confusion = multiclass_confusion_matrix(predicted, labels, num_classes=count)
    aurocs, precisions = [], []
    for i in range(count):
        aurocs.append(score_class(binary_auroc, probabilities[:, i], labels == i))
        precisions.append(score_class(binary_average_precision, probabilities[:, i], labels == i))
    right, support, named = confusion.diag(), confusion.sum(1), confusion.sum(0)
    recall = right / support
    return {
        "macro_f1": macro_f1(probabilities, labels),
        "balanced_accuracy": float(recall[support > 0].mean()),
        "auroc": sum(aurocs) / count,
        "auroc_undefined_classes": sum(map(math.isnan, aurocs)),
        "auroc_per_class": aurocs,
        "average_precision": sum(precisions) / count,
        "mcc": float(multiclass_matthews_corrcoef(predicted, labels, num_classes=count)),
        "calibration_error": calibration_error(probabilities, labels),
        "recall_per_class": recall.tolist(),
        "specificity_per_class": multiclass_specificity(
            predicted, labels, num_classes=count, average="none"
        ).tolist(),
        "precision_per_class": (right / named).tolist(),
        "confusion_matrix": confusion.tolist(),
    }


def class_tables(probabilities: Tensor, labels: Tensor, classes: list[str], scores: dict[str, Any]) -> str:
    """Lay out the scores of every class and the confusion matrix in aligned columns."""
    places = list(range(len(classes)))
    report = classification_report(
        labels, probabilities.argmax(1), labels=places, target_names=classes, zero_division=0, digits=3
    )
    confusion = pd.DataFrame(scores["confusion_matrix"], classes, classes)
    title = "Confusion matrix (rows true, columns predicted)"
    return "\n".join(["", report.rstrip(), "", title, confusion.to_string()])


def fit_temperature(
    logits: Tensor, targets: Tensor, loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
) -> float:
    """Find the temperature with the lowest loss, so that 0.8 is right in 80 of 100 cases.

    It changes no prediction, only how sure of it the model is.

    Args:
        logits: (N, C) of images that the model was not trained on.
        targets: (N, …), of classes (N,).
        loss: of logits and targets, a likelihood.

    Returns:
        A number from 0.1 to 10; 1 where a logit is not finite.
    """
    if not torch.isfinite(logits).all():
        return 1.0
    exact, truth = logits.double().cpu(), targets.cpu()

    def at(log_temperature: float) -> float:
        return float(loss(exact / math.exp(log_temperature), truth))

    found = minimize_scalar(
        at, bounds=(math.log(LOWEST), math.log(HIGHEST)), method="bounded", options={"xatol": 1e-5}
    )
    return math.exp(float(found.x))


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Give the probabilities (N, C) of logits at a temperature, on the CPU."""
    return torch.softmax(logits.cpu().float() / temperature, 1)


def without_nan(value: Any) -> Any:
    """Replace NaN by None at any depth: JSON has no NaN, and strict readers refuse it."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def score_class(metric: Any, scores: Tensor, positive: Tensor) -> float:
    """Score one class against the rest, (N,) and (N,); NaN where it has no positives or nothing else."""
    # torchmetrics answers 0 where a curve is undefined, which would read as a terrible model.
    if positive.all() or not positive.any() or not torch.isfinite(scores).all():
        return math.nan
    return float(metric(scores, positive.long()))


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Give the expected calibration error of probabilities (N, C), NaN where one is not finite."""
    if not torch.isfinite(probabilities).all():
        return math.nan
    return float(
        multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=BINS)
    )
