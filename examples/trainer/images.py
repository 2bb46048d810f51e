"""Every image is decoded and resized once, and stays in memory as 8-bit pixels."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .dicom import SUFFIXES as DICOM
from .dicom import is_dicom, read_dicom
from .errors import TrainerError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp", *DICOM}


@dataclass
class Images:
    """A labelled set of images.

    Attributes:
        pixels: (N, C, H, W), uint8; C is 1 (grey) or 3 (RGB).
        labels: (N,), positions in `classes`.
        classes: the names of the classes, in a fixed order.
        groups: (N,), images with one number never fall into different parts of a split.
        parts: (N,), "train", "val" or "test" where the data bring their own split, else None.
        names: of the N images, as their source names them, None where it does not.
        subgroups: of the N patients, such as their sex or scanner, None where they are not asked for.
        broken: what is wrong with each image that was left out.
    """

    pixels: Tensor
    labels: Integers
    classes: list[str]
    groups: Integers
    parts: npt.NDArray[np.str_] | None = None
    names: list[str] | None = None
    subgroups: list[str] | None = None
    broken: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)


def stack(arrays: Sequence[Bytes]) -> Tensor:
    """Join images (H, W) or (H, W, 3) into one tensor (N, C, H, W)."""
    pixels = torch.from_numpy(np.stack(arrays))
    return pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def read_image(path: Path) -> Bytes:
    """Decode one file of any depth as (H, W) or (H, W, 3), uint8.

    Raises:
        TrainerError: the file is no image, is damaged, or holds more than one grey or RGB plane.
    """
    try:
        array = _read(path)
    # Damaged files raise whatever their format's parser stumbles on.
    except Exception as error:
        raise TrainerError(
            f"{path} could not be read as an image: {error}. Repair it, or take it out."
        ) from error
    try:
        return as_image(array)
    except ValueError as error:
        raise TrainerError(f"{path} {error}") from error


def as_image(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring decoded pixels of any depth to (H, W) or (H, W, 3), uint8.

    Raises:
        ValueError: they are neither grey nor RGB.
    """
    if array.ndim == 3 and array.shape[2] == 4:
        array = array[..., :3]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(
            f"has the shape {array.shape}; a grey or RGB image of shape (H, W) or "
            "(H, W, 3) is needed. Store one file for each slice or page."
        )
    return to_uint8(array)


def to_uint8(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring one image to 8 bit.

    A file of 16 bits does not say how many of them the scanner used (12 are common), so an image
    deeper than 8 bit is stretched from its own minimum to its own maximum.
    """
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    values = array.astype(np.float64)
    low, high = float(values.min()), float(values.max())
    stretched = (values - low) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8)


def resize(array: Bytes, height: int, width: int | None = None) -> Bytes:
    """Resize, to a square where no width is given. The whole image stays in view: a crop might cut off the finding."""
    size = (height, height if width is None else width)
    if array.shape[:2] == size:
        return array
    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC))


def digest(array: Bytes) -> str:
    """Name an image by its content, so that exact copies share a name."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def _read(path: Path) -> npt.NDArray[np.generic]:
    if is_dicom(path):
        return read_dicom(path)
    is_tiff = path.suffix.lower() in {".tif", ".tiff"}
    try:
        with Image.open(path) as opened:
            pages = getattr(opened, "n_frames", 1)
            if pages > 1:
                raise TrainerError(f"it holds {pages} pages or slices; store each in a file of its own")
            deep_colour = opened.mode.startswith("RGB") and ";16" in str(opened.tile)
            if not deep_colour:
                return pixels_of(opened)
            if not is_tiff:
                # Pillow keeps the upper 8 of 16 bits; a wider type has them stretched like others.
                return pixels_of(opened).astype(np.uint16)
    except UnidentifiedImageError:
        if not is_tiff:
            raise
    return np.asarray(tifffile.imread(path))


def pixels_of(opened: Image.Image) -> npt.NDArray[np.generic]:
    """Decode what Pillow has opened: upright, grey or RGB, values deeper than 8 bit as they are."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    return np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))
