"""The default volumes: blocks of an average brain, with its grey and white matter.

The wheel of nilearn carries the MNI ICBM152 template of 2009 (Fonov et al. 2011), symmetric and without the
skull: its T1-weighted image, and maps of how likely a voxel is grey or white matter. It is a toy: one brain,
the mean of 152 people, whose maps were made from T1-weighted images in the first place.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import TrainerError
from ..files.nifti import read_nifti
from .rows import Rows

SIDE = 40  # voxels of 1 mm
LEAST = 0.15  # of a block is brain
TEMPLATE = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"

Volume = npt.NDArray[Any]


def brain_rows() -> Rows:
    """Cut the template into blocks of 40 × 40 × 40 that share no voxel.

    A block and its mirror image in the other hemisphere stand for a patient: the template is symmetric, so
    one of them would give the other away.

    Raises:
        TrainerError: nilearn is not installed.
    """
    image: Volume = read_nifti(template_file("t1"))
    grey, white = read_nifti(template_file("gm")), read_nifti(template_file("wm"))
    mask = tissues(grey, white)
    middle = image.shape[2] // 2
    rows = []
    for z in range(0, image.shape[0] - SIDE + 1, SIDE):
        for y in range(0, image.shape[1] - SIDE + 1, SIDE):
            for apart in range(0, middle - SIDE + 1, SIDE):
                for name, x in (("one", middle + 1 + apart), ("other", middle - apart - SIDE)):
                    block = np.s_[z : z + SIDE, y : y + SIDE, x : x + SIDE]
                    if (image[block] > 0).mean() >= LEAST:
                        place = f"{z} {y} {apart}"
                        rows.append((image[block], f"{place} {name} side", [mask[block]], place))
    return Rows(pd.DataFrame(rows, columns=["item", "name", "mask", "patient"]))


def tissues(grey: Volume, white: Volume) -> npt.NDArray[np.uint8]:
    """Give 1 where grey matter is likely, 2 where white matter is, else 0; the maps go from 0 to 255."""
    likely = np.maximum(grey, white) > 127
    labels: npt.NDArray[np.uint8] = (likely * (1 + (white > grey))).astype(np.uint8)
    return labels


def template_file(kind: str) -> Path:
    """Find a file of the template without importing nilearn, which takes seconds."""
    try:
        path = Path(str(distribution("nilearn").locate_file(TEMPLATE.format(kind))))
    except PackageNotFoundError as error:
        raise TrainerError(
            "The default volumes come in nilearn's wheel: pip install nilearn (the 'brain' extra), or give "
            "your own with --data."
        ) from error
    if not path.is_file():
        raise TrainerError(
            f"This nilearn has no {path.name}. Take nilearn 0.14, or give your own with --data."
        )
    return path
