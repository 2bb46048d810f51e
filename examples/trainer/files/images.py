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
import torch
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from ..errors import TrainerError
from ..scripts.dicom import SUFFIXES as DICOM
from ..scripts.dicom import patient_of, read_series
from ..scripts.files import PICTURES, is_nifti, is_picture, read_file
from ..scripts.pixels import Bytes, as_image, dimensions_of, is_colour, require_dimensions, resize
from .nifti import read_nifti

Integers = npt.NDArray[np.int64]

SUFFIXES = {*PICTURES, ".nii", *DICOM}
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
    return is_picture(path) or is_nifti(path)


def load(
    items: Sequence[Any], size: int, *, stored: Sequence[int] | None = None, skip_broken: bool = False
) -> Loaded:
    """Decode images side by side.

    Images of one shape that are no larger than `size` are kept as they are: a batch is enlarged when it is
    needed, which saves memory. All others are resized, and nothing is cut off.

    Args:
        items: paths, folders of DICOM slices, arrays, or functions that give an array.
        size: the side in pixels.
        stored: the shape to resize to instead, (H, W) for images alone, (D, H, W) for volumes alone.
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
    dimensions = None
    if stored is not None:
        dimensions = len(stored)
    try:
        array = decode(item, dimensions)
    except TrainerError as error:
        return str(error)
    patient = ""
    if isinstance(item, Path):
        patient = patient_of(item)
    shape = array.shape[: dimensions_of(array)]
    return _shrunk(array, size, stored), digest(array), patient, shape


def decode(item: Any, dimensions: int | None = None) -> Bytes:
    """Decode one image or volume of any depth to 8 bit.

    Args:
        item: a path, a folder of DICOM slices, an array, or a function that gives an array.
        dimensions: 2 where an image is needed, 3 where a volume is.

    Raises:
        TrainerError: it is no image, is damaged, or is a volume where an image is needed, or the reverse.
    """
    try:
        array = as_image(_values_of(item))
        if dimensions is not None:
            require_dimensions(array, dimensions)
        return array
    # Damaged files raise whatever their format's parser stumbles on.
    except Exception as error:
        if not isinstance(item, Path):
            raise TrainerError(f"An image could not be read: {error}") from error
        raise TrainerError(
            f"{item} could not be read as an image: {error}. Repair it, or take it out."
        ) from error


def _values_of(item: Any) -> npt.NDArray[np.generic]:
    if isinstance(item, Path):
        return read_values(item)
    values: npt.NDArray[np.generic] = item() if callable(item) else item
    return values


def stack(arrays: Sequence[Bytes]) -> Tensor:
    """Join images of one size as (N, C, H, W), volumes as (N, C, D, H, W); grey becomes RGB beside RGB."""
    colours = list(map(is_colour, arrays))
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
    if stored is not None:
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
    if is_nifti(path):
        return read_nifti(path)
    return read_file(path)
