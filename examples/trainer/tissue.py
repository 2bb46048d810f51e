"""The default data: is a patch of real tissue stained, judged by its texture alone?

scikit-image's immunohistochemistry image shows human colon, brown where the antibody stain (DAB)
bound and blue elsewhere. Colour deconvolution (Ruifrok and Johnston, 2001) measures the stain and
gives the labels. The model sees the patches in grey and with equal brightness and contrast, so
that neither colour nor darkness gives the label away.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from skimage.color import rgb2gray, rgb2hed
from skimage.data import immunohistochemistry

from .rows import Rows

PATCH, STEP, BLOCK = 32, 16, 64  # pixels


def tissue_rows() -> Rows:
    """Cut the 512 × 512 image into 576 overlapping patches of 32 × 32, half of them positive.

    Patches overlap only within their block of 64 × 64 pixels. The block stands for a patient, so patches in
    different parts of a split never share a pixel.
    """
    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    grey, stain = rgb2gray(section), rgb2hed(section)[..., 2]
    corners = patch_corners(section.shape[0])
    amounts = np.array([_patch(stain, corner).mean() for corner in corners])
    middle = np.median(amounts)
    rows = []
    for (y, x), amount in zip(corners, amounts, strict=True):
        label = ("unstained", "stained")[int(amount > middle)]
        patch = _equalise(_patch(grey, (y, x)))
        rows.append((patch, f"row {y} column {x}", label, f"block {y // BLOCK} {x // BLOCK}"))
    return Rows(pd.DataFrame(rows, columns=["item", "name", "label", "patient"]))


def patch_corners(side: int, step: int = STEP) -> list[tuple[int, int]]:
    """List the upper left corner (y, x) of every patch that lies within one block, `step` pixels apart."""
    within = range(0, BLOCK - PATCH + 1, step)
    starts = [block + offset for block in range(0, side, BLOCK) for offset in within]
    return [(y, x) for y in starts for x in starts]


def _patch(plane: npt.NDArray[np.float64], corner: tuple[int, int]) -> npt.NDArray[np.float64]:
    y, x = corner
    return plane[y : y + PATCH, x : x + PATCH]


def _equalise(patch: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    standard = (patch - patch.mean()) / max(float(patch.std()), 1e-6)
    eight_bit: npt.NDArray[np.uint8] = (128 + 50 * standard).clip(0, 255).astype(np.uint8)
    return eight_bit
