"""Files of every kind as 8-bit pixels: pictures, DICOM, NIfTI; decoded once, and kept in memory.

An image is (H, W) or (H, W, 3), a volume (D, H, W) or (D, H, W, 3).
"""

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from monai.data.image_reader import NibabelReader
from monai.transforms.spatial.array import Resize
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from .dicom import SUFFIXES as DICOM
from .dicom import looks_like_dicom, patient_of, read_dicom, read_series
from .errors import TrainerError

Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]

NIFTI = (".nii", ".nii.gz")
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
    """

    pixels: Tensor
    rows: Integers
    digests: list[str]
    patients: list[str]
    blank: npt.NDArray[np.bool_]
    broken: list[str]


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

    def attempt(item: Any) -> tuple[Bytes, str, str] | str:
        try:
            array = decode(item)
        except TrainerError as error:
            return str(error)
        patient = patient_of(item) if isinstance(item, Path) else ""
        return _shrunk(array, stored or size), digest(array), patient

    # A bar only on a terminal: a log would be full of carriage returns.
    decoded = thread_map(
        attempt, items, max_workers=4, desc="reading images", unit="image", leave=False, disable=None
    )
    found = [(row, one) for row, one in enumerate(decoded) if not isinstance(one, str)]
    broken = [one for one in decoded if isinstance(one, str)]
    if broken and not (skip_broken and found):
        raise TrainerError(_complaint(broken, len(decoded)))
    arrays = [one[0] for _, one in found]
    return Loaded(
        stack(arrays, size if stored is None else stored),
        np.array([row for row, _ in found], dtype=np.int64),
        [one[1] for _, one in found],
        [one[2] for _, one in found],
        np.array([array.min() == array.max() for array in arrays]),
        broken,
    )


def decode(item: Any) -> Bytes:
    """Decode one image or volume of any depth to 8 bit.

    Raises:
        TrainerError: it is no image, is damaged, or has more than one grey or RGB plane.
    """
    try:
        if isinstance(item, Path):
            return as_image(_read(item))
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
    colour = array.ndim in (3, 4) and array.shape[-1] == 3
    if not colour and array.ndim not in (2, 3):
        raise ValueError(
            f"it has the shape {array.shape}; a grey or RGB image of shape (H, W) or (H, W, 3), or a volume, is "
            "needed"
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
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    stretched = (values - low) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8)


def resize(array: Bytes, height: int, width: int | None = None) -> Bytes:
    """Resize an image, to a square where no width is given. The whole stays in view: a crop might cut off the finding."""
    size = (height, height if width is None else width)
    if array.shape[:2] == size:
        return array
    return np.asarray(Image.fromarray(array).resize(size[::-1], Image.Resampling.BICUBIC))


def resize_volume(array: Bytes, size: Sequence[int]) -> Bytes:
    """Resize a volume (D, H, W) or (D, H, W, 3)."""
    grey = array.ndim == 3
    if array.shape[:3] == tuple(size):
        return array
    # (D, H, W, C) → (C, D, H, W)
    channels = torch.from_numpy(array[..., None] if grey else array).permute(3, 0, 1, 2).float()
    resized = Resize(size, mode="trilinear", anti_aliasing=True)(channels)
    values = torch.as_tensor(resized).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()
    return values[..., 0] if grey else values


def stack(arrays: Sequence[Bytes], size: int | Sequence[int]) -> Tensor:
    """Join images into one tensor (N, C, H, W), volumes into (N, C, D, H, W); grey becomes RGB beside RGB.

    Raises:
        TrainerError: images and volumes mix.
    """
    colour = [array.shape[-1] == 3 and array.ndim > 2 for array in arrays]
    planes = {array.ndim - shade for array, shade in zip(arrays, colour, strict=True)}
    if len(planes) > 1:
        raise TrainerError("Some of the images are volumes, and some are not. Give the one or the other.")
    dimensions = planes.pop()
    shape = tuple(size) if isinstance(size, Sequence) else (size,) * dimensions
    if isinstance(size, int) and len({array.shape[:dimensions] for array in arrays}) == 1:
        shape = arrays[0].shape[:dimensions]
    result = []
    for array, shade in zip(arrays, colour, strict=True):
        fitted = resize(array, *shape) if dimensions == 2 else resize_volume(array, shape)
        fitted = fitted if shade else fitted[..., None]
        result.append(np.repeat(fitted, 3, axis=-1) if any(colour) and not shade else fitted)
    # (N, …, C) → (N, C, …)
    return torch.from_numpy(np.stack(result)).movedim(-1, 1).contiguous()


def digest(array: Bytes) -> str:
    """Name an image by its content, so that exact copies share a name."""
    return hashlib.sha256(repr(array.shape).encode() + array.tobytes()).hexdigest()


def _shrunk(array: Bytes, size: int | Sequence[int]) -> Bytes:
    """Resize what is larger than needed at once, so that a set of large images never lies in memory."""
    volume = array.ndim == 4 or (array.ndim == 3 and array.shape[-1] != 3)
    dimensions = 3 if volume else 2
    shape = (size,) * dimensions if isinstance(size, int) else tuple(size)
    if max(array.shape[:dimensions]) <= max(shape) or len(shape) != dimensions:
        return array
    return resize_volume(array, shape) if volume else resize(array, *shape)


def _complaint(broken: list[str], count: int) -> str:
    if len(broken) == 1:
        return f"{broken[0]} Or leave it out with --skip-broken." if count > 1 else broken[0]
    shown = "\n  ".join(broken[:SHOWN])
    more = f"\n  and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    hint = "" if len(broken) == count else "\nLeave them out with --skip-broken."
    return f"{len(broken)} of {count} images cannot be read:\n  {shown}{more}{hint}"


def _read(path: Path) -> npt.NDArray[np.generic]:
    if path.is_dir():
        return read_series(path)
    if path.name.lower().endswith(NIFTI):
        return _read_nifti(path)
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
    return np.asarray(image.convert("L" if image.mode in {"1", "L", "LA"} else "RGB"))


def _read_nifti(path: Path) -> npt.NDArray[np.generic]:
    """Read a volume as ITK orders its voxels: from the feet up, each slice seen from there, the front on top."""
    reader = NibabelReader(as_closest_canonical=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, _ = reader.get_data(reader.read(path))
    if values.ndim != 3:
        raise ValueError(f"it has the shape {values.shape}; one volume (X, Y, Z) is needed")
    # (X, Y, Z) of right, front, top → (Z, Y, X)
    volume = np.asarray(values).transpose(2, 1, 0)[:, ::-1, ::-1]
    return np.ascontiguousarray(volume[0] if len(volume) == 1 else volume)
