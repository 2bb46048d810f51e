"""Files of every kind as 8-bit pixels: pictures, DICOM, NIfTI; decoded once, and kept in memory.

An image is (H, W) or (H, W, 3), a volume (D, H, W) or (D, H, W, 3).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from monai.transforms.spatial.array import Resize
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from .dicom import SUFFIXES as DICOM
from .dicom import looks_like_dicom, patient_of, read_dicom, read_series
from .errors import TrainerError
from .nifti import SUFFIXES as NIFTI
from .nifti import read_nifti

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp", ".nii", *DICOM}
SHOWN = 5  # broken images that a message names


@dataclass
class Loaded:
    """The images that could be read.

    Attributes:
        pixels: (N, C, H, W) or (N, C, D, H, W), uint8; C is 1 (grey) or 3 (RGB).
        rows: (N,) their places among those that were asked for.
        digests: of the N originals.
        patients: of the N originals, from their DICOM header; else empty.
        blank: (N,) whether an image has one value everywhere.
        broken: what is wrong with each of the others.
        shapes: of the N originals, without colour.
    """

    pixels: Tensor
    rows: Integers
    digests: list[str]
    patients: list[str]
    blank: npt.NDArray[np.bool_]
    broken: list[str]
    shapes: list[tuple[int, ...]]

    def only(self, chosen: Integers) -> "Loaded":
        """Give some of the images, by their positions."""
        return Loaded(
            self.pixels[torch.from_numpy(chosen)],
            self.rows[chosen],
            [self.digests[i] for i in chosen],
            [self.patients[i] for i in chosen],
            self.blank[chosen],
            self.broken,
            [self.shapes[i] for i in chosen],
        )


def is_image(path: Path) -> bool:
    """Say whether a file is read: by its suffix, or, as a PACS writes them, DICOM without one."""
    if path.suffix.lower() in SUFFIXES or path.name.lower().endswith(NIFTI):
        return True
    nameless = path.suffix == "" or path.suffix[1:].isdigit()
    return nameless and looks_like_dicom(path)


def load(
    items: Sequence[Any], size: int, *, stored: Sequence[int] | None = None, skip_broken: bool = False
) -> Loaded:
    """Decode images side by side.

    Images of one shape that are no larger than `size` are kept as they are: a batch is enlarged when it is
    needed, which saves memory. All others are resized, and nothing is cut off.

    Args:
        items: paths, folders of DICOM slices, arrays, or functions that give an array.
        size: the side in pixels.
        stored: the shape to resize to instead, (H, W) or (D, H, W).
        skip_broken: leave out what cannot be read.

    Raises:
        TrainerError: some cannot be read, and are not to be left out; or none can; or images and volumes mix.
    """
    # A bar only on a terminal: a log would be full of carriage returns.
    attempt = partial(_attempt, size=size, stored=stored)
    decoded = thread_map(
        attempt, items, max_workers=4, desc="reading images", unit="image", leave=False, disable=None
    )
    arrays, rows, digests, patients, blank, broken, shapes = [], [], [], [], [], [], []
    for row, one in enumerate(decoded):
        if isinstance(one, str):
            broken.append(one)
            continue
        array, own_digest, patient, shape = one
        arrays.append(array)
        rows.append(row)
        digests.append(own_digest)
        patients.append(patient)
        shapes.append(shape)
        blank.append(array.min() == array.max())
    if broken and not (skip_broken and arrays):
        raise TrainerError(complaint(broken, len(decoded)))
    pixels = stack(_of_one_size(arrays, size, stored))
    return Loaded(pixels, np.array(rows), digests, patients, np.array(blank), broken, shapes)


def _attempt(
    item: Any, size: int, stored: Sequence[int] | None
) -> tuple[Bytes, str, str, tuple[int, ...]] | str:
    """Give an image, its digest, its patient and its own shape, or what is wrong with it."""
    try:
        array = decode(item)
    except TrainerError as error:
        return str(error)
    patient = ""
    if isinstance(item, Path):
        patient = patient_of(item)
    shape = array.shape[: dimensions_of(array)]
    return _shrunk(array, size, stored), digest(array), patient, shape


def decode(item: Any) -> Bytes:
    """Decode one image or volume of any depth to 8 bit.

    Raises:
        TrainerError: it is no image, is damaged, or has more than one grey or RGB plane.
    """
    try:
        if isinstance(item, Path):
            return as_image(read_values(item))
        return as_image(item() if callable(item) else item)
    # Damaged files raise whatever their format's parser stumbles on.
    except Exception as error:
        if not isinstance(item, Path):
            raise TrainerError(f"An image could not be read: {error}") from error
        raise TrainerError(
            f"{item} could not be read as an image: {error}. Repair it, or take it out."
        ) from error


def as_image(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring decoded pixels of any depth to uint8, without an alpha channel.

    Raises:
        ValueError: they are neither an image nor a volume, grey or RGB.
    """
    if array.ndim >= 3 and array.shape[-1] == 4:
        array = array[..., :3]
    if array.ndim - int(_is_colour(array)) not in (2, 3):
        raise ValueError(
            f"it has the shape {array.shape}; a grey or RGB image of shape (H, W) or (H, W, 3), or a volume, "
            "is needed"
        )
    if 0 in array.shape:
        raise ValueError("it has no pixels")
    return to_uint8(array)


def to_uint8(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring one image to 8 bit.

    A file of 16 bits does not say how many of them the scanner used (12 are common), so an image deeper than
    8 bit is stretched from its own minimum to its own maximum. NaN becomes black, infinity black or white.
    """
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    stretched = (values - low) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8)


def resize(array: Bytes, size: Sequence[int]) -> Bytes:
    """Resize an image to (H, W), a volume to (D, H, W); nothing is cut off, which might be the finding."""
    if array.shape[: len(size)] == tuple(size):
        return array
    if len(size) == 2:
        return np.asarray(Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    # (D, H, W) or (D, H, W, C) → (C, D, H, W)
    channels = torch.from_numpy(array).reshape(*array.shape[:3], -1).movedim(-1, 0).float()
    resized = torch.as_tensor(Resize(size, mode="trilinear", anti_aliasing=True)(channels))
    # (C, D, H, W) → (D, H, W) or (D, H, W, C)
    values = resized.round().clamp(0, 255).byte().movedim(0, -1)
    return values.reshape(*size, *array.shape[3:]).numpy()


def dimensions_of(array: Bytes) -> int:
    """Say whether it is an image, 2, or a volume, 3."""
    return array.ndim - int(_is_colour(array))


def _is_colour(array: npt.NDArray[np.generic]) -> bool:
    return array.ndim > 2 and array.shape[-1] == 3


def stack(arrays: Sequence[Bytes]) -> Tensor:
    """Join images of one size as (N, C, H, W), volumes as (N, C, D, H, W); grey becomes RGB beside RGB."""
    colours = list(map(_is_colour, arrays))
    channels = []
    for array, colour in zip(arrays, colours, strict=True):
        if not colour:
            array = array[..., None]
        if any(colours) and not colour:
            array = np.repeat(array, 3, axis=-1)
        channels.append(array)
    # (N, …, C) → (N, C, …)
    return torch.from_numpy(np.stack(channels)).movedim(-1, 1).contiguous()


def digest(array: Bytes) -> str:
    """Name an image by its content, so that exact copies share a name."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def _shrunk(array: Bytes, size: int, stored: Sequence[int] | None) -> Bytes:
    """Resize what is larger than needed at once, so that a set of large images never lies in memory."""
    dimensions = dimensions_of(array)
    if stored is not None and len(stored) == dimensions:
        return resize(array, stored)
    if max(array.shape[:dimensions]) <= size:
        return array
    return resize(array, (size,) * dimensions)


def _of_one_size(arrays: Sequence[Bytes], size: int, stored: Sequence[int] | None) -> list[Bytes]:
    kinds = set(map(dimensions_of, arrays))
    if len(kinds) > 1:
        raise TrainerError("Some of the images are volumes, and some are not. Give the one or the other.")
    dimensions = kinds.pop()
    shapes = {array.shape[:dimensions] for array in arrays}
    shape = (size,) * dimensions
    if len(shapes) == 1:
        shape = min(shapes)
    return [resize(array, stored or shape) for array in arrays]


def complaint(broken: Sequence[str], count: int, what: str = "images") -> str:
    """Tell of files that cannot be read, and how to leave them out."""
    if count == 1:
        return broken[0]
    lines = [f"{len(broken)} of {count} {what} cannot be read:", *broken[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"and {len(broken) - SHOWN} more")
    text = "\n  ".join(lines)
    if len(broken) < count:
        text += "\nLeave them out with --skip-broken."
    return text


def read_values(path: Path) -> npt.NDArray[np.generic]:
    """Decode a file as it is, before it is brought to 8 bit."""
    if path.is_dir():
        return read_series(path)
    if path.name.lower().endswith(NIFTI):
        return read_nifti(path)
    if path.suffix.lower() in DICOM or looks_like_dicom(path):
        return read_dicom(path)
    is_tiff = path.suffix.lower() in {".tif", ".tiff"}
    try:
        with Image.open(path) as opened:
            pages = getattr(opened, "n_frames", 1)
            if pages > 1:
                raise TrainerError(f"it holds {pages} pages; store each in a file of its own")
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
    if image.mode in {"1", "L", "LA"}:
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))
