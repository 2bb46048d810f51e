"""ROC and precision-recall curves, with the point at which the model is operated."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_curve

from .figures import BEST, COLOURS, DASHES, MARKERS, plain, shorten

MOST_CURVES = 12


@dataclass
class Curve:
    """Scores of one class or finding.

    Attributes:
        scores: (N,).
        positive: (N,), whether it is there.
        point: `sensitivity`, `specificity` and `ppv` at its threshold; empty for none.
    """

    scores: npt.NDArray[np.floating]
    positive: npt.NDArray[np.bool_]
    point: Mapping[str, Any]

    @property
    def defined(self) -> bool:
        """Whether some images have it and some have not, and every score is a number."""
        return 0 < self.positive.sum() < len(self.positive) and bool(np.isfinite(self.scores).all())


def draw_curves(curves: Mapping[str, Curve], title: str, path: Path) -> None:
    """Draw the ROC and the precision-recall curve of each class that has them.

    Args:
        curves: by class; the first twelve are drawn.
        title: one line above both.
        path: the PNG to write.
    """
    lines = 2 * min(len(curves), MOST_CURVES)
    figure = Figure(
        figsize=(10.4, 5.6 + 0.2 * lines), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.1, wspace=0.05)
    )
    left, right = figure.subplots(1, 2)
    for place, (name, curve) in enumerate(list(curves.items())[:MOST_CURVES]):
        if curve.defined:
            _draw(left, right, place, name, curve)
    left.plot([0, 1], [0, 1], color=BEST, linewidth=1, linestyle=":")
    left.set(xlabel="1 − specificity", ylabel="sensitivity", title="ROC")
    right.set(xlabel="recall (sensitivity)", ylabel="precision (PPV)", title="precision and recall")
    for axes in (left, right):
        axes.set(xlim=(-0.01, 1.01), ylim=(0, 1.02))
        plain(axes)
        if axes.get_legend_handles_labels()[0]:
            # Below: within the axes a curve may lie anywhere.
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False, fontsize=8.5)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path)


def _draw(left: Axes, right: Axes, place: int, name: str, curve: Curve) -> None:
    style: dict[str, Any] = {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place % len(DASHES)],
    }
    false, true, _ = roc_curve(curve.positive, curve.scores)
    left.plot(false, true, label=f"{shorten(name)}, area {auc(false, true):.3f}", **style)
    precision, recall, _ = precision_recall_curve(curve.positive, curve.scores)
    area = average_precision_score(curve.positive, curve.scores)
    share = curve.positive.mean()
    label = f"{shorten(name)}, average precision {area:.3f} ({share:.0%} have it)"
    right.step(recall, precision, where="post", label=label, **style)
    if not curve.point:
        return
    point = curve.point
    marker: dict[str, Any] = {
        "color": style["color"],
        "marker": MARKERS[place % len(MARKERS)],
        "markersize": 9,
        "markeredgecolor": "white",
        "linestyle": "none",
        "zorder": 3,
    }
    sensitivity, specificity, precision_there = point["sensitivity"], point["specificity"], point["ppv"]
    words = f"from {point['threshold']:.2f}: sensitivity {sensitivity:.2f}, specificity {specificity:.2f}"
    left.plot([1 - specificity], [sensitivity], label=words, **marker)
    right.plot([sensitivity], [precision_there], label=f"PPV {precision_there:.2f} there", **marker)
