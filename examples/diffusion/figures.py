"""Pictures of a run: the loss, and images side by side, one row for each prompt or adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

LINE = "#0072B2"  # from the palette of Okabe and Ito, told apart with any colour vision


def draw_losses(losses: Sequence[float], title: str, path: Path) -> None:
    """Draw the loss of each step and its running mean.

    Args:
        losses: one a step.
        title: one line above.
        path: the PNG to write.
    """
    window = max(1, len(losses) // 20)
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure = Figure(figsize=(6, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color=LINE, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(range(window, len(losses) + 1), smooth, color=LINE, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="weighted squared error", title=title)
    axes.set_ylim(bottom=0, top=1.05 * float(np.quantile(losses, 0.99)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, bbox_inches="tight")


def draw_pictures(rows: Mapping[str, Tensor], title: str, path: Path) -> None:
    """Draw images in rows, each row named at its left.

    Args:
        rows: uint8 images (N, 3, H, W) by name.
        title: one line above all.
        path: the PNG to write; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = max(len(images) for images in rows.values())
    figure = Figure(figsize=(1.7 + 1.05 * columns, 0.5 + 1.05 * len(rows)), dpi=150, layout="constrained")
    every = np.atleast_1d(figure.subplots(len(rows), 1))
    for axes, (name, images) in zip(every, rows.items(), strict=True):
        _draw_row(axes, images)
        axes.set_ylabel(fill(name, 22), rotation=0, ha="right", va="center", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight")


def draw_comparison(images: Mapping[str, Tensor], prompts: Sequence[str], title: str, path: Path) -> None:
    """Draw what several adapters make of the same prompts and noise: a row for each adapter, a column for each prompt.

    Args:
        images: uint8 images (P · n, 3, H, W) by the name of the adapter, n of each prompt in turn.
        prompts: P texts.
        title: one line above all.
        path: the PNG to write; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    each = len(next(iter(images.values()))) // len(prompts)
    width = max(1.05 * each, 1.6)
    figure = Figure(
        figsize=(1.7 + width * len(prompts), 0.9 + 1.05 * len(images)), dpi=150, layout="constrained"
    )
    grid = figure.subplots(len(images), len(prompts), squeeze=False)
    for row, (name, found) in zip(grid, images.items(), strict=True):
        for i, axes in enumerate(row):
            _draw_row(axes, found[i * each : (i + 1) * each])
        row[0].set_ylabel(fill(name, 22), rotation=0, ha="right", va="center", fontsize=8)
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title(fill(prompt, int(13 * width)), fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, bbox_inches="tight")


def _draw_row(axes: Axes, images: Tensor) -> None:
    grid = make_grid(images, nrow=len(images), padding=1, pad_value=255)
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)
