"""One label for each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..figures import draw_reliability, draw_roc, draw_training, titled
from ..scores import SHOWN, fit_temperature, macro_f1, scaled, score, table
from ..settings import Settings
from .names import check_classes, number_classes
from .task import Outcome, Targets, Task


class Classify(Task):
    """Which of several classes an image belongs to."""

    score = "macro_f1"
    words = SHOWN
    loss_words = "cross entropy"

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that the classes make sense."""
        check_classes(cls.named(rows))

    @classmethod
    def named(cls, rows: pd.DataFrame) -> list[str]:
        """Give the labels."""
        return list(rows["label"])

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Number the classes."""
        labels, classes = number_classes(list(rows["label"]))
        return Targets(torch.from_numpy(labels), classes, labels, classes)

    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Tensor:
        """Number the labels."""
        return torch.tensor([self.names.index(label) for label in rows["label"]])

    def weigh(self, targets: Tensor) -> Tensor:
        """Give (C,) weights by which every class has the same weight."""
        counts = torch.bincount(targets, minlength=len(self.names))
        return (len(targets) / (len(self.names) * counts)).float()

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean cross entropy of logits (B, C) and labels (B,); class weights are 1 in the mean."""
        return cross_entropy(outputs, targets, weights, reduction="none").mean()

    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Give the macro-F1."""
        return macro_f1(outputs, targets)

    def fit(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Fit the temperature."""
        return {"temperature": fit_temperature(outputs, targets)}

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score the probabilities; the calibration error is given before the temperature too."""
        found = score(probabilities_of(outcome), outcome.targets)
        untempered = score(scaled(outcome.outputs, 1), outcome.targets)["calibration_error"]
        return {**found, "calibration_error_untempered": untempered}

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores, those of every class, and the confusion matrix."""
        return table(probabilities_of(outcome), outcome.targets, self.names, dict(scores))

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give `prediction`, and for each class its probability in `p(CLASS)`."""
        probabilities = scaled(outputs, fitted["temperature"])
        found = pd.DataFrame({"prediction": [self.names[i] for i in probabilities.argmax(1).tolist()]})
        for place, name in enumerate(self.names):
            found[f"p({name})"] = probabilities[:, place].tolist()
        return found

    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give `label`."""
        return pd.DataFrame({"label": [self.names[i] for i in targets.tolist()]})

    def count(self, targets: Tensor) -> dict[str, int]:
        """Count the images of each class."""
        counts = torch.bincount(targets, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training with the confusion matrix, the calibration and the ROC curves."""
        test, temperature = record["test"], outcome.fitted["temperature"]
        probabilities = probabilities_of(outcome)
        draw_training(record, self, torch.tensor(test["confusion_matrix"]), title, folder / "training.png")
        panels = {
            titled("as trained", test["calibration_error_untempered"]): scaled(outcome.outputs, 1),
            titled(f"temperature {temperature:.2f}", test["calibration_error"]): probabilities,
        }
        draw_reliability(panels, outcome.targets, folder / "reliability.png")
        draw_roc(probabilities, outcome.targets, self.names, folder / "roc.png")


def probabilities_of(outcome: Outcome) -> Tensor:
    """Give the probabilities (N, C) at the fitted temperature."""
    return scaled(outcome.outputs, outcome.fitted["temperature"])
