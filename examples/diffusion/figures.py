"""Pictures of a run: the loss, and images side by side, one row for each prompt or adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid


def draw_losses(losses: Sequence[float], title: str, path: Path) -> None:
    """Draw the loss of each step and its running mean."""
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure = Figure(figsize=(6, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="C0", alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(range(window, len(losses) + 1), smooth, color="C0", label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="weighted squared error", title=title)
    axes.set_ylim(bottom=0, top=1.05 * float(np.quantile(losses, 0.99)))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def draw_pictures(rows: Mapping[str, Tensor], title: str, path: Path, columns: Sequence[str] = ("",)) -> None:
    """Draw images in rows, and in columns where there are several prompts.

    Args:
        rows: uint8 images (P · n, 3, H, W) by name, n for each column in turn.
        title: one line above all.
        path: the PNG to write; its folder is made.
        columns: P names.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    each = len(next(iter(rows.values()))) // len(columns)
    width = max(1.05 * each, 1.6)
    size = (1.7 + width * len(columns), 0.9 + 1.05 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        for axes, some in zip(line, images.split(each), strict=True):
            picture = make_grid(some, nrow=each, padding=1, pad_value=255)
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")  # (3, H, W) → (H, W, 3)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(fill(name, 22), rotation=0, ha="right", va="center", fontsize=8)
    for axes, column in zip(grid[0], columns, strict=True):
        axes.set_title(fill(column, int(13 * width)), fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight")
