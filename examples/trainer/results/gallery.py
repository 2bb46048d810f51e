"""The most confident mistakes, as pictures: what they show, and where the network looked."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..data.batches import Preprocessing
from ..pictures.gradcam import gradcam
from ..tasks import Mistake

SHOWN_MISTAKES, COLUMNS = 12, 4


def draw_gallery(
    network: nn.Module | None,
    mistakes: Sequence[Mistake],
    pixels: Tensor,
    names: Sequence[str],
    preprocessing: Preprocessing,
    path: Path,
) -> None:
    """Draw the first of some mistakes, and where the network looked, if it has a feature map that shows it.

    Args:
        network: adapted or plain, on the CPU; None where it cannot be asked.
        mistakes: the most confident first; at least one.
        pixels: (N, C, H, W) or (N, C, D, H, W), uint8, of the test.
        names: of the N images.
        preprocessing: from pixels to the input.
        path: the PNG to write.
    """
    shown = list(mistakes)[:SHOWN_MISTAKES]
    columns = min(COLUMNS, len(shown))
    lines = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.3 * columns, 0.8 + 2.8 * lines), dpi=110, layout=ConstrainedLayoutEngine())
    grid = figure.subplots(lines, 2 * columns, squeeze=False).flat
    note = "No feature map of this network shows where it looked."
    for place, mistake in enumerate(shown):
        image, attention = pixels[mistake.row], None
        if network is not None:
            attention = gradcam(network, preprocessing(image), mistake.output)
        left, right = grid[2 * place], grid[2 * place + 1]
        _draw_pair(left, right, image, attention)
        words = f"{names[mistake.row][-28:]}\n{mistake.words}"
        left.text(0, -0.04, words, fontsize=8, va="top", transform=left.transAxes)
        if attention is not None:
            cells = " × ".join(map(str, attention.shape))
            note = f"Right of each picture what speaks for the wrong answer, on a grid of {cells} (Grad-CAM)."
    for axes in grid:
        axes.set_axis_off()
    figure.suptitle(f"The {len(shown)} most confident of {len(mistakes)} mistakes. {note}", fontsize=9)
    figure.savefig(path)


def _draw_pair(left: Axes, right: Axes, image: Tensor, attention: Tensor | None) -> None:
    """Draw an image, and beside it where the network looked; of a volume that slice where most is."""
    picture, place = image, 0
    if image.dim() == 4:
        place = image.shape[1] // 2
    if attention is not None:
        sides = tuple(image.shape[1:])
        mode = {2: "bilinear", 3: "trilinear"}[len(sides)]
        attention = interpolate(attention[None, None], sides, mode=mode)[0, 0]
        if image.dim() == 4:
            # (D, H, W) → (D,)
            place = int(attention.flatten(1).sum(1).argmax())
            attention = attention[place]
    if image.dim() == 4:
        picture = image[:, place]
        left.text(0.02, 0.02, f"slice {place}", color="white", fontsize=7, transform=left.transAxes)
    # (C, H, W) → (H, W, 3)
    colours = np.asarray(picture.expand(3, -1, -1).movedim(0, -1))
    left.imshow(colours)
    if attention is None:
        right.text(0, 0.5, "nothing in the map\nspeaks for it", fontsize=8)
    else:
        right.imshow(colours.mean(2), cmap="gray", vmin=0, vmax=255)
        right.imshow(attention.numpy(), cmap="inferno", alpha=0.5, vmin=0, vmax=1)


def without_checkpointing(network: nn.Module) -> None:
    """Let a timm model keep its activations again: those that are computed twice have no gradient."""
    switch = getattr(network, "set_grad_checkpointing", None)
    if callable(switch):
        switch(False)
