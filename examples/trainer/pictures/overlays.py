"""Pictures of a segmentation: how it was learned, how well each structure fits, what the fit looks like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from torch import Tensor

from .figures import BEST, COLOURS, Named, draw_progress, plain

MOST = len(COLOURS) - 1  # structures that are told apart by their colour


@dataclass
class Example:
    """One image with its masks.

    Attributes:
        title: above it.
        image: (H, W) or (H, W, 3).
        truth: (H, W), 0 for the background, else the number of the structure.
        predicted: likewise.
    """

    title: str
    image: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]


def draw_learning(record: Mapping[str, Any], task: Named, dice: Tensor, title: str, path: Path) -> None:
    """Draw the losses, the validation's Dice, and the Dice of every test image for each structure.

    Args:
        record: the metrics of the run.
        task: names the structures.
        dice: (N, S), NaN where a structure is not in an image.
        title: one line above all.
        path: the PNG to write.
    """
    width = max(3.2, 1 + 0.7 * len(task.names))
    figure = Figure(figsize=(8.6 + width, 4.2), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12))
    left, middle, right = figure.subplots(1, 3, width_ratios=[4.3, 4.3, width])
    draw_progress(left, middle, record, task)
    rng = np.random.default_rng(0)
    for place in range(len(task.names)):
        values = dice[:, place].numpy()
        values = values[~np.isnan(values)]
        beside = place + rng.uniform(-0.15, 0.15, len(values))
        right.scatter(beside, values, s=14, color=COLOURS[place % MOST], alpha=0.6, linewidths=0)
        if len(values):
            middle_value = float(np.median(values))
            right.plot([place - 0.3, place + 0.3], [middle_value] * 2, color="black", linewidth=1.5)
    right.set(
        ylim=(-0.02, 1.02), ylabel="Dice of a test image (bar: median)", xlim=(-0.6, len(task.names) - 0.4)
    )
    upright = max(map(len, task.names)) * len(task.names) > 24
    right.set_xticks(range(len(task.names)), task.names, rotation=90 * upright)
    plain(right)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path)


def draw_overlays(examples: Sequence[Example], names: Sequence[str], path: Path) -> None:
    """Draw images, and below each the contours of what is true and what is predicted.

    Args:
        examples: a column each.
        names: of the structures; the first six have a colour of their own.
        path: the PNG to write.
    """
    size = (3.4 * len(examples), 7.2)
    figure = Figure(figsize=size, dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.03))
    axes = figure.subplots(2, len(examples), squeeze=False)
    for column, example in enumerate(examples):
        for row in range(2):
            axes[row, column].imshow(example.image, cmap="gray", vmin=0, vmax=255)
            axes[row, column].set_axis_off()
        axes[0, column].set_title(example.title, fontsize=9)
        for number in range(1, len(names) + 1):
            colour = COLOURS[(number - 1) % MOST]
            _contour(axes[1, column], example.truth == number, colour, "-")
            _contour(axes[1, column], example.predicted == number, colour, "--")
        height, width = example.truth.shape
        axes[1, column].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    keys = [Line2D([], [], color=COLOURS[i % MOST], label=name) for i, name in enumerate(names[:MOST])]
    keys.append(Line2D([], [], color=BEST, linestyle="-", label="true"))
    keys.append(Line2D([], [], color=BEST, linestyle="--", label="predicted"))
    figure.legend(handles=keys, loc="outside lower center", ncols=min(4, len(keys)), frameon=False)
    figure.savefig(path)


def fullest_slice(truth: Tensor, predicted: Tensor) -> int:
    """Give the slice of a volume (D, H, W) with the most voxels of structures, true ones if there are any."""
    chosen = truth if (truth > 0).any() else predicted
    return int((chosen > 0).flatten(1).sum(1).argmax())


def _contour(axes: Axes, mask: npt.NDArray[np.bool_], colour: str, style: str) -> None:
    # A frame of background closes the contour of what reaches the edge.
    framed = np.pad(mask.astype(float), 1)
    if mask.any():
        places = [np.arange(side + 2) - 1 for side in mask.shape[::-1]]
        axes.contour(*places, framed, levels=[0.5], colors=colour, linestyles=style, linewidths=1.3)
