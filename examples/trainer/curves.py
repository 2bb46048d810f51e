"""Pictures of tasks that have no classes: how the training went, ROC curves of findings, agreement."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .figures import BEST, TRAIN, draw_progress, plain

if TYPE_CHECKING:
    from .tasks import Task


def draw_history(record: Mapping[str, Any], task: "Task", title: str, path: Path) -> None:
    """Draw the losses and the validation score.

    Args:
        record: the metrics, with `history` and `best_epoch`.
        task: says what the loss and the score are called.
        title: one line above all.
        path: the PNG to write.
    """
    figure = Figure(figsize=(8.6, 4.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, right = figure.subplots(1, 2)
    draw_progress(left, right, record, task)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def draw_agreement(truth: np.ndarray, predicted: np.ndarray, name: str, path: Path) -> None:
    """Draw what was predicted against what is true, and the differences over the means.

    The latter after Bland & Altman, Statistical methods for assessing agreement, Lancet 1986.

    Args:
        truth: (N,).
        predicted: (N,).
        name: of the quantity.
        path: the PNG to write.
    """
    figure = Figure(figsize=(9.6, 4.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, right = figure.subplots(1, 2)
    left.scatter(truth, predicted, s=14, color=TRAIN, alpha=0.6, linewidths=0)
    ends = [min(truth.min(), predicted.min()), max(truth.max(), predicted.max())]
    left.plot(ends, ends, color=BEST, linewidth=1, linestyle=":", label="equal")
    left.set(xlabel=f"{name}, true", ylabel=f"{name}, predicted")
    left.legend(frameon=False)
    difference = predicted - truth
    mean, deviation = float(difference.mean()), float(difference.std())
    right.scatter((truth + predicted) / 2, difference, s=14, color=TRAIN, alpha=0.6, linewidths=0)
    right.axhline(mean, color=BEST, linewidth=1, label=f"mean {mean:.3g}")
    for end in (mean - 1.96 * deviation, mean + 1.96 * deviation):
        right.axhline(end, color=BEST, linewidth=1, linestyle="--", label=f"limit of agreement {end:.3g}")
    right.set(xlabel="mean of true and predicted", ylabel="predicted − true")
    right.legend(frameon=False, fontsize=8)
    plain(left)
    plain(right)
    figure.savefig(path)
