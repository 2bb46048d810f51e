"""How often a model is right when it is sure: the reliability diagram, before and after the temperature."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from .metrics import BINS

# From the palette of Okabe and Ito, told apart with any colour vision.
BAR, LINE = "#56B4E9", "#595959"


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
        _draw_bins(upper, lower, confidence.numpy(), (predicted == labels).numpy())
        upper.set_title(title, fontsize=11)
        lower.set_xlabel("confidence")
    axes[0, 0].set_ylabel("share that is right")
    axes[1, 0].set_ylabel("images")
    # Outside: within the axes a bar may reach any height at any confidence.
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=9,
    )
    figure.savefig(path)


def _draw_bins(upper: Axes, lower: Axes, confidence: np.ndarray, right: np.ndarray) -> None:
    edges = np.linspace(0, 1, BINS + 1)
    # As torchmetrics bins: a confidence on an edge belongs to the bin below it.
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(place, minlength=BINS)
    shares = np.bincount(place, weights=right, minlength=BINS) / np.maximum(counts, 1)
    width = edges[1]
    upper.bar(edges[:-1], shares, width, align="edge", color=BAR, edgecolor="white", label="model")
    upper.plot([0, 1], [0, 1], "--", color=LINE, label="perfectly calibrated")
    upper.set(ylim=(0, 1.02), xlim=(0, 1))
    lower.bar(edges[:-1], counts, width, align="edge", color=BAR, edgecolor="white")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)


def titled(name: str, error: float) -> str:
    """Name a panel with its calibration error."""
    return f"{name}, calibration error {error:.3f}"


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Give the probabilities (N, C) of logits at a temperature, on the CPU."""
    return torch.softmax(logits.cpu().float() / temperature, 1)
