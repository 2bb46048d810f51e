"""One picture of a run: did it learn, did it stop in time, and what does it confuse?"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

# From the palette of Okabe and Ito, told apart with any colour vision; markers differ as well.
TRAIN, VAL, BEST = "#0072B2", "#D55E00", "#595959"
CELL = 0.55  # inches, room for four digits


def draw_training(
    history: list[dict[str, float]],
    best_epoch: int,
    confusion: list[list[int]],
    classes: list[str],
    title: str,
    path: Path,
) -> None:
    """Draw the losses, the validation score and the confusion matrix of the test.

    Args:
        history: one record an epoch: `train_loss`, `val_loss`, `val_macro_f1`.
        best_epoch: counted from 1.
        confusion: (C, C) counts, rows true and columns predicted.
        classes: the names of the C classes.
        title: one line above all.
        path: the PNG to write.
    """
    side = min(12.0, max(3.6, CELL * len(classes)))
    names = [_shorten(name) for name in classes]
    # The matrix needs room for its labels too, about 0.09 inches a character.
    margin = 0.9 + 0.09 * max(map(len, names))
    figure = Figure(
        figsize=(8.6 + side + margin, 0.9 + side + margin / 2),
        dpi=150,
        layout=ConstrainedLayoutEngine(w_pad=0.12),
    )
    left, middle, right = figure.subplots(1, 3, width_ratios=[4.3, 4.3, side + margin])
    _draw_losses(left, history, best_epoch)
    _draw_scores(middle, history, best_epoch)
    _draw_confusion(right, np.array(confusion), names, 72 * side / len(classes))
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def _draw_losses(axes: Axes, history: list[dict[str, float]], best_epoch: int) -> None:
    epochs = range(1, len(history) + 1)
    axes.plot(epochs, [r["train_loss"] for r in history], "o-", color=TRAIN, label="training")
    axes.plot(epochs, [r["val_loss"] for r in history], "s--", color=VAL, label="validation")
    _finish_curve(axes, len(history), best_epoch, "cross entropy")
    axes.set_ylim(bottom=0)


def _draw_scores(axes: Axes, history: list[dict[str, float]], best_epoch: int) -> None:
    scores = [r["val_macro_f1"] for r in history]
    axes.plot(range(1, len(history) + 1), scores, "s--", color=VAL, label="validation")
    _finish_curve(axes, len(history), best_epoch, "macro-F1")
    axes.set_ylim(0, 1.02)


def _finish_curve(axes: Axes, epochs: int, best_epoch: int, label: str) -> None:
    axes.axvline(best_epoch, color=BEST, linewidth=1, linestyle=":", label="kept epoch")
    axes.set(xlabel="epoch", ylabel=label, xlim=(0.5, epochs + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _draw_confusion(axes: Axes, confusion: np.ndarray, names: list[str], cell: float) -> None:
    """Shade by the share of the true class, so that rare classes show as well as common ones."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    longest = max(map(len, names))
    upright = len(names) > 3 or longest > 10
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true", title="test images, shaded by row")
    # A digit is about 0.65 of the font size wide, and a tenth of the cell stays free at each side.
    size = min(11.0, 0.8 * cell / (0.65 * len(str(confusion.max()))))
    for row, column in np.ndindex(confusion.shape):
        colour = "white" if share[row, column] > 0.55 else "black"
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _shorten(name: str) -> str:
    # From the middle: long names often differ at their end.
    return name if len(name) <= 22 else f"{name[:11]}…{name[-10:]}"
