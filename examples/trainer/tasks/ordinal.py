"""A grade: classes in an order, such as the stages of a retinopathy.

Learned by CORN (Shi, Cao & Raschka, Deep neural networks for rank-consistent ordinal regression based on
conditional probabilities, 2021, equations 4 to 6): output k says, of images above grade k - 1, whether they
are above grade k. Their products fall from grade to grade, so no two outputs contradict each other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import cohen_kappa_score
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import multiclass_confusion_matrix

from ..errors import TrainerError
from ..files.images import Integers
from ..judging.conformal import describe_sets, fit_cutoff, score_sets, sets_of
from ..judging.quick import Floats
from ..judging.scores import fit_temperature, macro_f1
from ..pictures.figures import draw_training
from ..scripts.grades import grades_of, probabilities_of
from ..settings import Settings
from .class_names import check_classes, number_classes
from .one_label import OneLabel
from .outcome import Outcome, Targets

WORDS = {
    "kappa": "quadratic kappa",
    "mae": "mean absolute error, in grades",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
}


class Ordinal(OneLabel):
    """Which of several grades an image has."""

    score = "kappa"
    words = WORDS
    lower = frozenset({"mae"})
    loss_words = "conditional cross entropy"

    @property
    def outputs(self) -> int:
        """How many outputs the model has: one less than there are grades."""
        return len(self.names) - 1

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that the grades have an order."""
        labels = cls.named(rows)
        check_classes(labels)
        number_grades(labels, settings.grade)

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Number the grades."""
        labels, grades = number_grades(cls.named(rows), settings.grade)
        return Targets(torch.from_numpy(labels), grades, labels, grades)

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean conditional cross entropy of logits (B, K - 1) and grades (B,)."""
        return conditional_loss(outputs, targets)

    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Give the quadratic kappa."""
        return kappa(targets.cpu().numpy(), grades_of(outputs.cpu()).numpy(), len(self.names))

    def fit(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Fit the temperature."""
        return {"temperature": fit_temperature(outputs, targets, conditional_loss)}

    def fit_sets(self, outcome: Outcome, coverage: float) -> dict[str, Any]:
        """Fit the probability from which a grade is in an image's set."""
        return {"sets": fit_cutoff(*arrays_of(outcome), coverage)}

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score the grades; `confusion_matrix` has rows true and columns predicted."""
        predicted, truth = grades_of(outcome.outputs), outcome.targets
        count = len(self.names)
        confusion = multiclass_confusion_matrix(predicted, truth, num_classes=count)
        one_hot = torch.nn.functional.one_hot(predicted, count).float()
        found: dict[str, Any] = {
            "kappa": kappa(truth.numpy(), predicted.numpy(), count),
            "mae": float((predicted - truth).abs().float().mean()),
            "accuracy": float((predicted == truth).float().mean()),
            "macro_f1": macro_f1(one_hot, truth),
            "recall_per_class": (confusion.diag() / confusion.sum(1)).tolist(),
            "confusion_matrix": confusion.tolist(),
        }
        if "sets" in outcome.fitted:
            probabilities, labels = arrays_of(outcome)
            found["sets"] = score_sets(sets_of(probabilities, outcome.fitted["sets"]["cutoff"]), labels)
        return found

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores and the confusion matrix."""
        lines = self.score_lines(scores)
        confusion = pd.DataFrame(scores["confusion_matrix"], self.names, self.names)
        title = "Confusion matrix (rows true, columns predicted)"
        lines += ["", title, confusion.to_string()]
        if "sets" in scores:
            lines += ["", *describe_sets(scores["sets"], outcome.fitted["sets"], {})]
        return "\n".join(lines)

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give `prediction`, each grade's probability in `p(GRADE)`, and the `set` of grades, as in `2|3`."""
        probabilities = probabilities_of(outputs / fitted["temperature"])
        found = self.said(grades_of(outputs), probabilities)
        if "sets" in fitted:
            found["set"] = self.sets(probabilities, fitted)
        return found

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training with the confusion matrix."""
        confusion = torch.tensor(record["test"]["confusion_matrix"])
        draw_training(record, self, confusion, title, folder / "training.png")


def arrays_of(outcome: Outcome) -> tuple[Floats, Integers]:
    """Give the probabilities (N, K) of each grade at the temperature, and the grades (N,), as arrays."""
    probabilities = probabilities_of(outcome.outputs / outcome.fitted["temperature"])
    return probabilities.double().numpy(), outcome.targets.numpy()


def number_grades(labels: Sequence[str], grades: Sequence[str]) -> tuple[Integers, list[str]]:
    """Give the place of each label (N,) in the order of the grades, and the grades.

    Raises:
        TrainerError: the labels are no numbers and their order is not given, or one is not in it.
    """
    if grades:
        unknown = sorted(set(labels) - set(grades))
        if unknown:
            raise TrainerError(
                f"The label '{unknown[0]}' is none of the grades {', '.join(grades)} (--grade)."
            )
        places = [list(grades).index(label) for label in labels]
        return np.array(places, dtype=np.int64), list(grades)
    for label in labels:
        try:
            float(label)
        except ValueError:
            raise TrainerError(
                f"The label '{label}' is no number, so the grades have no order. Give them from the lowest: "
                "--grade none --grade mild --grade severe."
            ) from None
    return number_classes(labels)


def conditional_loss(logits: Tensor, grades: Tensor) -> Tensor:
    """Give CORN's loss: output k learns from the images of grade k and above whether they are above it.

    Args:
        logits: (B, K - 1).
        grades: (B,), from 0 to K - 1.
    """
    place = torch.arange(logits.shape[1], device=logits.device)
    # (B,) → (B, 1), against (K - 1,)
    above, counts = grades[:, None] > place, grades[:, None] >= place
    losses = binary_cross_entropy_with_logits(logits, above.to(logits.dtype), reduction="none")
    return torch.where(counts, losses, 0.0).sum() / counts.sum()


def kappa(truth: np.ndarray, predicted: np.ndarray, count: int) -> float:
    """Give Cohen's kappa with quadratic weights; 0 where all are of one grade, true and predicted."""
    if len(np.union1d(truth, predicted)) < 2:
        return 0.0
    return float(cohen_kappa_score(truth, predicted, weights="quadratic", labels=np.arange(count)))
