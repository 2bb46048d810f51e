"""A quantity: an age, a density, an ejection fraction."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from ..errors import TrainerError
from ..files.images import Integers
from ..judging.conformal import conformal_quantile
from ..pictures.figures import draw_agreement, draw_history
from ..settings import Settings
from .outcome import Outcome, Targets
from .task import Task

STRATA = 5  # parts of the range, of equally many images
WORDS = {
    "r2": "R²",
    "mae": "mean absolute error",
    "rmse": "root mean squared error",
    "spearman": "Spearman's correlation",
}


class Regress(Task):
    """How much of something an image shows.

    The model's output is in standard deviations from the mean of the training images, so that one learning
    rate suits years and millimetres alike.
    """

    score = "r2"
    words = WORDS
    lower = frozenset({"mae", "rmse"})
    loss_words = "Huber loss, in standard deviations"

    def __init__(self, names: Sequence[str], center: float = 0.0, scale: float = 1.0) -> None:
        super().__init__(names)
        self.center, self.scale = center, scale

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that every label is a finite number, and that not all are one."""
        values = numbers_of(rows["label"])
        if len(np.unique(values)) < 2:
            raise TrainerError(
                f"Every label is {values[0]:g}. A quantity that does not vary cannot be learned."
            )

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Read the numbers; a split is balanced by fifths of them."""
        values = numbers_of(rows["label"])
        name = settings.label_column or "label"
        names = [f"fifth {place + 1} of the values" for place in range(STRATA)]
        return Targets(torch.from_numpy(values).float(), [name], fifths(values), names, exact=False)

    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Tensor:
        """Read the numbers."""
        return torch.from_numpy(numbers_of(rows["label"])).float()

    def prepared(self, targets: Tensor) -> "Regress":
        """Give the task with the mean and the standard deviation of the training images."""
        center, scale = float(targets.mean()), float(targets.std(unbiased=False))
        task = Regress(self.names, center, scale or 1.0)
        task.details = self.details
        return task

    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean Huber loss of outputs (B, 1) and numbers (B,)."""
        # (B, 1) → (B,)
        return smooth_l1_loss(outputs.squeeze(1), (targets - self.center) / self.scale)

    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Give R², which has no unit."""
        truth = (targets.cpu() - self.center) / self.scale
        return determination(truth.numpy(), outputs.squeeze(1).cpu().numpy())

    def fit(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Give the mean and the standard deviation, which the predictions need."""
        return {"center": self.center, "scale": self.scale}

    def fit_sets(self, outcome: Outcome, coverage: float) -> dict[str, Any]:
        """Fit how far to either side of a prediction the truth lies at most in a share of the images.

        Split conformal prediction by absolute residuals (Lei et al. 2018, arXiv 1604.04173); what
        `conformal.py` says of its promise holds here too.
        """
        errors = np.abs(in_units(outcome.outputs, outcome.fitted) - outcome.targets.numpy())
        half: float | None = conformal_quantile(errors, coverage)
        if half == math.inf:
            half = None
        return {"interval": {"coverage": coverage, "half_width": half, "images": len(errors)}}

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score the predictions in their own unit; R² is NaN for one image, or images of one value."""
        truth, predicted = outcome.targets.numpy(), in_units(outcome.outputs, outcome.fitted)
        if not np.isfinite(predicted).all():
            return dict.fromkeys(self.words, math.nan)
        found = {}
        half = half_width(outcome.fitted)
        if half is not None:
            found["interval_coverage"] = float((np.abs(truth - predicted) <= half).mean())
        varies = len(np.unique(truth)) > 1 and len(np.unique(predicted)) > 1
        return {
            **found,
            "r2": determination(truth, predicted),
            "mae": float(mean_absolute_error(truth, predicted)),
            "rmse": float(root_mean_squared_error(truth, predicted)),
            "spearman": float(spearmanr(truth, predicted).statistic) if varies else math.nan,
        }

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores, beside the error of a constant prediction."""
        lines = self.score_lines(scores)
        constant = float((outcome.targets - outcome.fitted["center"]).abs().mean())
        lines.append(f"  (the mean of the training images has a mean absolute error of {constant:.4f})")
        if "interval" in outcome.fitted:
            lines.append(describe_interval(outcome.fitted["interval"], scores))
        return "\n".join(lines)

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give `prediction`, in the unit of the labels, and the interval from `low` to `high`."""
        found = pd.DataFrame({"prediction": in_units(outputs, fitted)})
        half = half_width(fitted)
        if half is not None:
            found["low"], found["high"] = found["prediction"] - half, found["prediction"] + half
        return found

    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give `label`."""
        return pd.DataFrame({"label": targets.tolist()})

    def count(self, targets: Tensor) -> dict[str, int]:
        """Count the images."""
        return {"images": len(targets)}

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training, and what was predicted against what is true."""
        draw_history(record, self, title, folder / "training.png")
        predicted = in_units(outcome.outputs, outcome.fitted)
        draw_agreement(outcome.targets.numpy(), predicted, self.names[0], folder / "agreement.png")


def numbers_of(labels: pd.Series) -> np.ndarray:
    """Read labels as numbers; a comma may be the decimal point.

    Raises:
        TrainerError: one is no finite number.
    """
    found = []
    for label in labels:
        try:
            value = float(str(label).replace(",", "."))
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise TrainerError(
                f"The label '{label}' is no finite number, and --task regress learns a quantity. Name the "
                "column with --label-column, or take --task classify."
            )
        found.append(value)
    return np.array(found)


def fifths(values: np.ndarray) -> Integers:
    """Give for each value (N,) which fifth of the values it lies in, from 0."""
    edges = np.quantile(values, np.linspace(0, 1, STRATA + 1)[1:-1])
    return np.searchsorted(edges, values, side="left").astype(np.int64)


def in_units(outputs: Tensor, fitted: Mapping[str, Any]) -> np.ndarray:
    """Give outputs (N, 1) as numbers (N,) in the unit of the labels."""
    # (N, 1) → (N,)
    values: np.ndarray = (outputs.squeeze(1) * fitted["scale"] + fitted["center"]).numpy()
    return values


def half_width(fitted: Mapping[str, Any]) -> float | None:
    """Give how far the interval goes to either side of a prediction, None where there is none."""
    half: float | None = fitted.get("interval", {}).get("half_width")
    return half


def describe_interval(fitted: Mapping[str, Any], scores: Mapping[str, Any]) -> str:
    """Say what the interval promises, and what it held on the test."""
    coverage = f"{fitted['coverage']:g}"
    if fitted["half_width"] is None:
        return f"{fitted['images']} validation images are too few for an interval that holds {coverage}."
    held = f"{scores['interval_coverage']:.3f}"
    return (
        f"The prediction ± {fitted['half_width']:.4g} promises to hold the truth in {coverage} of the "
        f"images, and holds it in {held}."
    )


def determination(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Give the coefficient of determination; NaN where it is not defined."""
    if len(np.unique(truth)) < 2 or not np.isfinite(predicted).all():
        return math.nan
    return float(r2_score(truth, predicted))
