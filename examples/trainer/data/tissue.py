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
from skimage.filters import gaussian, threshold_otsu

from ..errors import TrainerError
from .rows import Rows

PATCH, STEP, BLOCK = 32, 16, 64  # pixels


def tissue_rows(task: str = "classify") -> Rows:
    """Cut the 512 × 512 image into 576 overlapping patches of 32 × 32.

    Patches overlap only within their block of 64 × 64 pixels. The block stands for a patient, so patches in
    different parts of a split never share a pixel.

    Args:
        task: decides what is asked: classify, whether there is more of the stain than in half of the patches;
            multilabel, that, and the same of the blue counterstain of nuclei; ordinal, in which quarter the
            amount of the stain lies; regress, the amount.
    """
    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    grey, stains = rgb2gray(section), rgb2hed(section)
    corners = patch_corners(section.shape[0])
    table = pd.DataFrame({"item": [_equalise(_patch(grey, corner)) for corner in corners]})
    table["name"] = [f"row {y} column {x}" for y, x in corners]
    table["patient"] = [f"block {y // BLOCK} {x // BLOCK}" for y, x in corners]
    amounts = pd.Series([_patch(stains[..., 2], corner).mean() for corner in corners])
    nuclei = pd.Series([_patch(stains[..., 0], corner).mean() for corner in corners])
    match task:
        case "classify":
            table["label"] = _above_half(amounts).map({0: "unstained", 1: "stained"})
        case "multilabel":
            table["label:stained"] = _above_half(amounts).astype(str)
            table["label:nuclei"] = _above_half(nuclei).astype(str)
        case "ordinal":
            table["label"] = pd.qcut(amounts, 4, labels=False).astype(str)
        case "regress":
            table["label"] = (100 * amounts).round(4).astype(str)
        case _:
            raise TrainerError(f"There are no default data for --task {task}. Give --data.")
    return Rows(table)


def stain_rows() -> Rows:
    """Cut the image into 64 crops of 64 × 64 that share no pixel, each with the mask of what is stained.

    The threshold of the stain is Otsu's, after a little smoothing.
    """
    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    grey = (255 * rgb2gray(section)).round().astype(np.uint8)
    stain = gaussian(rgb2hed(section)[..., 2])  # type: ignore[no-untyped-call]
    threshold = threshold_otsu(stain)  # type: ignore[no-untyped-call]
    stained = (stain > threshold).astype(np.uint8)
    rows = []
    for y in range(0, section.shape[0], BLOCK):
        for x in range(0, section.shape[1], BLOCK):
            crop = np.s_[y : y + BLOCK, x : x + BLOCK]
            rows.append((grey[crop], f"row {y} column {x}", [stained[crop]]))
    return Rows(pd.DataFrame(rows, columns=["item", "name", "mask"]))


def _above_half(amounts: pd.Series) -> pd.Series:
    return (amounts > amounts.median()).astype(int)


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
