"""One label for each image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..files.images import Integers
from ..judging.conformal import coverage_of, describe_sets, fit_cutoff, score_sets, sets_of
from ..judging.quick import Floats, shown_scores
from ..judging.scores import SHOWN, calibration_error, class_tables, fit_temperature, macro_f1, scaled, score
from ..judging.thresholds import describe_rule, fit_threshold, measures_at, operating_table
from ..pictures.figures import draw_reliability, draw_training, titled
from ..pictures.figures_curves import Curve, draw_curves
from ..settings import Settings
from .class_names import check_classes, number_classes
from .one_label import OneLabel
from .outcome import Mistake, Outcome, Targets


class Classify(OneLabel):
    """Which of several classes an image belongs to."""

    score = "macro_f1"
    words = SHOWN
    lower = frozenset({"calibration_error"})
    loss_words = "cross entropy"
    draws = 1000

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that the classes make sense."""
        check_classes(cls.named(rows))

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Number the classes."""
        labels, classes = number_classes(list(rows["label"]))
        return Targets(torch.from_numpy(labels), classes, labels, classes)

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

    def fit_thresholds(self, outcome: Outcome, rule: str) -> dict[str, Any]:
        """Fit a threshold for each class against the rest; none for a class that has none or all images."""
        probabilities, labels = arrays_of(outcome)
        thresholds = {}
        for place, name in enumerate(self.names):
            threshold = fit_threshold(probabilities[:, place], labels == place, rule)
            if np.isfinite(threshold):
                thresholds[name] = threshold
        return {"operating": {"rule": rule, "thresholds": thresholds}}

    def fit_sets(self, outcome: Outcome, coverage: float) -> dict[str, Any]:
        """Fit the probability from which a class is in an image's set."""
        return {"sets": fit_cutoff(*arrays_of(outcome), coverage)}

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score the probabilities; the calibration error is given before the temperature too.

        Where they were fitted, `operating` has the measures at each class's threshold, `sets` the coverage.
        """
        found = score(probabilities_of(outcome), outcome.targets)
        untempered = calibration_error(scaled(outcome.outputs, 1), outcome.targets)
        found["calibration_error_untempered"] = untempered
        if "operating" in outcome.fitted:
            found["operating"] = self._operating(outcome)
        if "sets" in outcome.fitted:
            probabilities, labels = arrays_of(outcome)
            inside = sets_of(probabilities, outcome.fitted["sets"]["cutoff"])
            found["sets"] = score_sets(inside, labels)
        return found

    def _operating(self, outcome: Outcome) -> dict[str, dict[str, float]]:
        """Give the measures at the threshold of each class that has one."""
        probabilities, labels = arrays_of(outcome)
        points = {}
        for name, threshold in outcome.fitted["operating"]["thresholds"].items():
            place = self.names.index(name)
            measures = measures_at(probabilities[:, place], labels == place, threshold)
            points[name] = {"threshold": threshold}
            for measure, values in measures.items():
                points[name][measure] = float(values[0])
        return points

    def numbers(self, outcome: Outcome, counts: Floats) -> dict[str, Floats]:
        """Give the scores that are shown, the measures at the thresholds, coverage and size of the sets."""
        probabilities, labels = arrays_of(outcome)
        found = shown_scores(probabilities, labels, counts)
        for name, threshold in outcome.fitted.get("operating", {}).get("thresholds", {}).items():
            place = self.names.index(name)
            measures = measures_at(probabilities[:, place], labels == place, threshold, counts)
            for measure, values in measures.items():
                found[f"{measure}({name})"] = values
        if "sets" in outcome.fitted:
            inside = sets_of(probabilities, outcome.fitted["sets"]["cutoff"])
            found |= coverage_of(inside, labels, counts)
        return found

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores, those of every class, and the confusion matrix."""
        lines = self.score_lines(scores)
        undefined = scores["auroc_undefined_classes"]
        if undefined:
            lines.append(f"  (AUROC is undefined for {undefined} of {len(self.names)} classes)")
        lines.append(class_tables(probabilities_of(outcome), outcome.targets, self.names, dict(scores)))
        found = scores.get("intervals", {})
        if scores.get("operating"):
            rule = outcome.fitted["operating"]["rule"]
            lines += ["", f"At each class's threshold: {describe_rule(rule)}"]
            lines.append(operating_table(scores["operating"], found))
        if "sets" in scores:
            lines += ["", *describe_sets(scores["sets"], outcome.fitted["sets"], found)]
        return "\n".join(lines)

    def mistakes(self, outcome: Outcome) -> list[Mistake]:
        """Give the images whose most probable class is not theirs."""
        confidence, predicted = probabilities_of(outcome).max(1)
        found = []
        for row in confidence.argsort(descending=True, stable=True).tolist():
            truth, guess = int(outcome.targets[row]), int(predicted[row])
            if truth != guess:
                words = f"true: {self.names[truth]}\npredicted: {self.names[guess]}, {confidence[row]:.2f}"
                found.append(Mistake(row, words, guess))
        return found

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give `prediction`, and for each class its probability in `p(CLASS)`.

        Where they were fitted, `positive(CLASS)` is 1 from the class's threshold on, and `set` has the
        classes that it takes to hold the true one, as in `benign|normal`.
        """
        probabilities = scaled(outputs, fitted["temperature"])
        found = self.said(probabilities.argmax(1), probabilities)
        for name, threshold in fitted.get("operating", {}).get("thresholds", {}).items():
            found[f"positive({name})"] = (found[f"p({name})"] >= threshold).astype(int)
        if "sets" in fitted:
            found["set"] = self.sets(probabilities, fitted)
        return found

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training with the confusion matrix, the calibration, and the curves of every class."""
        test, temperature = record["test"], outcome.fitted["temperature"]
        probabilities = probabilities_of(outcome)
        draw_training(record, self, torch.tensor(test["confusion_matrix"]), title, folder / "training.png")
        panels = {
            titled("as trained", test["calibration_error_untempered"]): scaled(outcome.outputs, 1),
            titled(f"temperature {temperature:.2f}", test["calibration_error"]): probabilities,
        }
        draw_reliability(panels, outcome.targets, folder / "reliability.png")
        curves = {}
        for place, name in enumerate(self.names):
            point = test.get("operating", {}).get(name, {})
            positive = (outcome.targets == place).numpy()
            curves[name] = Curve(probabilities[:, place].numpy(), positive, point)
        draw_curves(curves, title, folder / "curves.png")


def arrays_of(outcome: Outcome) -> tuple[Floats, Integers]:
    """Give the probabilities (N, C) and the labels (N,) as arrays."""
    return probabilities_of(outcome).double().numpy(), outcome.targets.numpy()


def probabilities_of(outcome: Outcome) -> Tensor:
    """Give the probabilities (N, C) at the fitted temperature."""
    return scaled(outcome.outputs, outcome.fitted["temperature"])
