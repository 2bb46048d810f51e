"""Pictures of a run: did it learn, did it stop in time, what does it confuse, is it right when it is sure?"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

from ..judging.scores import BINS

# From the palette of Okabe and Ito, told apart with any colour vision; markers differ as well.
TRAIN, VAL, BEST = "#0072B2", "#D55E00", "#595959"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#595959")
DASHES = ("-", "--", "-.", ":")
MARKERS = "osD^vP*X"
CELL = 0.55  # inches, room for four digits


class Named(Protocol):
    """What a task is called in a picture: its outputs, its loss, its scores. See `tasks/task.py`."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the outputs."""

    @property
    def loss_words(self) -> str:
        """What the loss is called."""

    @property
    def score(self) -> str:
        """Key of the score by which the epoch is chosen."""

    @property
    def words(self) -> Mapping[str, str]:
        """What the scores are called, by their keys."""


def draw_training(record: Mapping[str, Any], task: Named, confusion: Tensor, title: str, path: Path) -> None:
    """Draw the losses, the validation score and the confusion matrix of the test.

    Args:
        record: the metrics, with `history` and `best_epoch`.
        task: has the names of the C classes.
        confusion: (C, C) counts, rows true and columns predicted.
        title: one line above all.
        path: the PNG to write.
    """
    count = len(task.names)
    side = min(12.0, max(3.6, CELL * count))
    names = [shorten(name) for name in task.names]
    # The matrix needs room for its labels too, about 0.09 inches a character.
    margin = 0.9 + 0.09 * max(map(len, names))
    figure = Figure(
        figsize=(8.6 + side + margin, 0.9 + side + margin / 2),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.12),
    )
    left, middle, right = figure.subplots(1, 3, width_ratios=[4.3, 4.3, side + margin])
    draw_progress(left, middle, record, task)
    _draw_confusion(right, confusion.numpy(), names, 72 * side / count)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def draw_progress(left: Axes, right: Axes, record: Mapping[str, Any], task: Named) -> None:
    """Draw the losses and the validation score over the epochs.

    Args:
        left: for the losses.
        right: for the score.
        record: the metrics, with `history` and `best_epoch`.
        task: says what the loss and the score are called.
    """
    history, best_epoch = record["history"], record["best_epoch"]
    epochs = range(1, len(history) + 1)
    left.plot(epochs, [epoch["train_loss"] for epoch in history], "o-", color=TRAIN, label="training")
    left.plot(epochs, [epoch["val_loss"] for epoch in history], "s--", color=VAL, label="validation")
    _finish_curve(left, len(history), best_epoch, task.loss_words)
    left.set_ylim(bottom=0)
    scores = [epoch[f"val_{task.score}"] for epoch in history]
    right.plot(epochs, scores, "s--", color=VAL, label="validation")
    _finish_curve(right, len(history), best_epoch, task.words[task.score])
    # A score such as R² may be below 0.
    right.set_ylim(min(0, *scores), 1.02)


def _finish_curve(axes: Axes, epochs: int, best_epoch: int, label: str) -> None:
    axes.axvline(best_epoch, color=BEST, linewidth=1, linestyle=":", label="kept epoch")
    axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, epochs + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    axes.legend(frameon=False)


def _draw_confusion(axes: Axes, confusion: np.ndarray, names: list[str], cell: float) -> None:
    """Shade by the share of the true class, so that rare classes show as well as common ones."""
    support = confusion.sum(1, keepdims=True)
    share = confusion / np.maximum(support, 1)
    longest = max(map(len, names))
    upright = len(names) > 3 or longest > 10
    # A digit is about 0.65 of the font size wide, and a tenth of the cell stays free at each side.
    size = min(11.0, 0.8 * cell / (0.65 * len(str(confusion.max()))))
    display = ConfusionMatrixDisplay(share, display_labels=names)
    display.plot(
        ax=axes,
        cmap="Blues",
        colorbar=False,
        im_kw={"vmin": 0, "vmax": 1},
        text_kw={"fontsize": size},
        xticks_rotation=90 * upright,
    )
    for place in np.ndindex(confusion.shape):
        display.text_[place].set_text(str(confusion[place]))
    recalls = []
    for name, total, recall in zip(names, support[:, 0], share.diagonal(), strict=True):
        recalls.append(f"{name}\n{recall:.0%} of {total}" if total else f"{name}\nno image")
    axes.set_yticks(range(len(names)), recalls, fontsize=min(10.0, 0.3 * cell))
    axes.set(xlabel="predicted", ylabel="true, and how many are found", title="test images, shaded by row")


def draw_reliability(panels: dict[str, Tensor], labels: Tensor, path: Path) -> None:
    """Draw the accuracy and the number of images in each bin of the confidence.

    Args:
        panels: a title and (N, C) probabilities for each panel.
        labels: (N,).
        path: the PNG to write.
    """
    figure = Figure(figsize=(4.2 * len(panels), 5.2), dpi=150, layout=ConstrainedLayoutEngine(wspace=0.06))
    axes = figure.subplots(2, len(panels), height_ratios=[3, 1], sharex=True, sharey="row", squeeze=False)
    for column, (title, probabilities) in enumerate(panels.items()):
        confidence, predicted = probabilities.max(1)
        upper, lower = axes[0, column], axes[1, column]
        CalibrationDisplay.from_predictions(
            (predicted == labels).numpy(),
            confidence.clamp(0, 1).numpy(),
            n_bins=BINS,
            ax=upper,
            color=TRAIN,
            label="model",
            pos_label=1,
        )
        upper.get_legend().remove()
        upper.set(xlabel="", ylabel="", ylim=(0, 1.02), xlim=(0, 1))
        upper.set_title(title, fontsize=11)
        lower.hist(confidence.numpy(), bins=BINS, range=(0, 1), color="#56B4E9", edgecolor="white")
        lower.set_xlabel("confidence")
        plain(upper)
        plain(lower)
    axes[0, 0].set_ylabel("share that is right")
    axes[1, 0].set_ylabel("images")
    # Outside: within the axes a point may lie anywhere.
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path)


def draw_history(record: Mapping[str, Any], task: Named, title: str, path: Path) -> None:
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


def titled(name: str, error: float) -> str:
    """Name a panel with its calibration error."""
    return f"{name}, calibration error {error:.3f}"


def plain(axes: Axes) -> None:
    """Take the frame off, and lay a light grid below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def shorten(name: str) -> str:
    """Cut a name that is long, from the middle: long ones often differ at their end."""
    if len(name) > 22:
        return f"{name[:11]}…{name[-10:]}"
    return name
