"""MedMNIST and MedMNIST+ archives of 2-d images (Yang et al. 2023, https://medmnist.com), with the split that they bring."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from .errors import TrainerError
from .images import Images, digest, resize, stack, to_uint8
from .naming import number_classes
from .split import PARTS, join_groups


def read_npz(file: Path, size: int) -> Images:
    """Read a MedMNIST file of 2-d images, with the split that it brings.

    Images smaller than `size` are kept as they are and enlarged batch by batch, which saves memory.
    """
    arrays = _npz_arrays(file)
    images = np.concatenate([arrays[f"{part}_images"] for part in PARTS])
    numbers = np.concatenate([arrays[f"{part}_labels"] for part in PARTS])
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim != 1:
        raise TrainerError(
            f"{file} has labels of shape {numbers.shape}: several for each image. This trainer takes one class for each image."
        )
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
        raise TrainerError(
            f"{file} has images of shape {images.shape}; this trainer takes 2-d ones, (N, H, W) or (N, H, W, 3)."
        )
    eight_bit = [to_uint8(image) for image in images]
    pixels = stack([resize(i, size) if max(i.shape[:2]) > size else i for i in eight_bit])
    labels, classes = number_classes([str(number) for number in numbers])
    parts = np.repeat(PARTS, [len(arrays[f"{part}_labels"]) for part in PARTS])
    return Images(pixels, labels, classes, join_groups([digest(i) for i in eight_bit]), parts)


def _npz_arrays(file: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(file) as opened:
            arrays = dict(opened)
    except (OSError, ValueError, BadZipFile) as error:
        raise TrainerError(f"{file} could not be read as a NumPy archive: {error}") from error
    needed = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise TrainerError(
            f"{file} has the arrays {', '.join(arrays)}, and no {', '.join(missing)}. "
            "A MedMNIST file has images and labels for train, val and test."
        )
    return arrays
