"""Masks in files: which values they may have, whether they lie on their image, and how they are written."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm.contrib.concurrent import thread_map

from ..errors import TrainerError
from ..scripts.dicom import SUFFIXES as DICOM
from ..scripts.dicom import pixel_sides
from ..scripts.files import NIFTI, is_nifti
from .images import Integers, read_values
from .nifti import canonical_affine, voxel_sides, write_nifti

MOST = 64  # values of one mask
HIGHEST = 2**16 - 1  # of them, in the files that are written
LOSSY = {".jpg", ".jpeg", ".webp"}
Found = tuple[Tensor, list[int]]


def load_masks(
    masks: Sequence[Sequence[Any]],
    items: Sequence[Any],
    shapes: Sequence[tuple[int, ...]],
    stored: Sequence[int],
) -> list[Found | str]:
    """Decode the masks of N images side by side.

    Args:
        masks: of each image one or more, paths or arrays; where one of them has a value, the image has it.
        items: the images, as `images.load` reads them.
        shapes: of the images, without colour.
        stored: the shape to resize to; the nearest value is taken, so that none is made up.

    Returns:
        For each the resized mask and the values of the whole one, or what is wrong with it.
    """
    attempt = partial(_attempt, stored=stored)
    found: list[Found | str] = thread_map(
        attempt,
        masks,
        items,
        shapes,
        max_workers=4,
        desc="reading masks",
        unit="mask",
        leave=False,
        disable=None,
    )
    return found


def _attempt(masks: Sequence[Any], item: Any, shape: tuple[int, ...], stored: Sequence[int]) -> Found | str:
    try:
        whole = read_mask(masks, item, shape)
    except TrainerError as error:
        return str(error)
    values = torch.from_numpy(whole.astype(np.int32))
    return resize_mask(values, stored), np.unique(whole).tolist()


def read_mask(masks: Sequence[Any], item: Any, shape: tuple[int, ...]) -> Integers:
    """Give the mask of an image in its own size.

    Raises:
        TrainerError: a file is no mask, or does not lie on the image.
    """
    joined: Integers | None = None
    for mask in masks:
        name = _name(mask)
        try:
            values = _values(mask)
            _check_place(mask, values.shape, item, shape)
        # Damaged files raise whatever their format's parser stumbles on.
        except Exception as error:
            raise TrainerError(f"{name} could not be read as a mask: {error}") from error
        joined = values if joined is None else np.maximum(joined, values)
    assert joined is not None
    return joined


def _values(mask: Any) -> Integers:
    """Give the values of one mask.

    Raises:
        ValueError: they are none.
    """
    raw = _raw(mask)
    if raw.ndim > 2 and raw.shape[-1] in (3, 4):
        if (raw[..., :3] != raw[..., :1]).any():
            raise ValueError(
                "it is in colour. Store one number for each pixel: 0 for background, 1, 2, … for structures"
            )
        raw = raw[..., 0]
    values = raw.astype(np.int64)
    if (values != raw).any() or not np.isfinite(raw).all():
        raise ValueError("it has values between whole numbers, as probabilities have. Store labels")
    if values.min() < 0:
        raise ValueError(
            f"it has the negative value {values.min()}. The background is 0, structures are above"
        )
    if values.max() > HIGHEST:
        raise ValueError(f"it has the value {values.max()}, and files of masks hold {HIGHEST} at most")
    count = len(np.unique(values))
    if count > MOST:
        raise ValueError(
            f"it has {count} different values, as an image has, or a mask that was smoothed. Store labels, "
            f"at most {MOST}, without interpolation"
        )
    if count > 2 and isinstance(mask, Path) and mask.suffix.lower() in LOSSY:
        raise ValueError(
            f"it has {count} different values, and {mask.suffix} files blur edges. Set a threshold and store "
            "it as PNG"
        )
    return values


def _raw(mask: Any) -> npt.NDArray[Any]:
    if not isinstance(mask, Path):
        return np.asarray(mask)
    if mask.suffix.lower() in DICOM:
        raise ValueError("DICOM masks are not read. Store it as NIfTI or PNG")
    if is_nifti(mask) or mask.suffix.lower() in (".tif", ".tiff"):
        return read_values(mask)
    with Image.open(mask) as opened:
        # Of a palette, the numbers are the labels, and the colours only show them.
        if opened.mode == "P":
            return np.asarray(opened)
    return read_values(mask)


def _check_place(mask: Any, found: tuple[int, ...], item: Any, shape: tuple[int, ...]) -> None:
    if found != shape:
        raise ValueError(
            f"it is {_by(found)}, and its image {_name(item)} is {_by(shape)}. A mask needs the image's size"
        )
    if is_nifti(mask) and is_nifti(item):
        apart = np.abs(canonical_affine(mask) - canonical_affine(item)).max()
        if apart > 0.1 * min(voxel_sides(item)):
            raise ValueError(
                f"it lies elsewhere than its image {_name(item)}: the affines differ by {apart:.3g} mm"
            )


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """Resize masks (…, H, W) or (…, D, H, W) by the nearest value."""
    dimensions = len(size)
    if tuple(mask.shape[-dimensions:]) == tuple(size):
        return mask
    # (…, H, W) → (B, 1, H, W)
    single = mask.reshape(-1, 1, *mask.shape[-dimensions:]).float()
    resized = interpolate(single, tuple(size), mode="nearest-exact")
    # (B, 1, H, W) → (…, H, W)
    return resized.reshape(*mask.shape[:-dimensions], *size).to(mask.dtype)


def sides_of(item: Any) -> tuple[float, ...] | None:
    """Give the sides in mm of a pixel (Y, X) or voxel (Z, Y, X) where the file tells."""
    if is_nifti(item):
        return voxel_sides(item)
    return pixel_sides(item) if isinstance(item, Path) else None


def mask_type(values: Sequence[int]) -> np.dtype[Any]:
    """Give the type of files that hold some values: 8 bit, or 16 where one of them needs it."""
    if max(values) > 255:
        return np.dtype(np.uint16)
    return np.dtype(np.uint8)


def write_mask(mask: npt.NDArray[Any], item: Any, path: Path) -> Path:
    """Write a mask in its image's geometry: NIfTI for NIfTI, TIFF for other volumes, else PNG; give the file.

    Args:
        mask: (H, W) or (D, H, W), of the image's own size and of the file's type.
        item: the image's path.
        path: without a suffix.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_nifti(item):
        path = path.with_name(path.name + ".nii.gz")
        write_nifti(mask, item, path)
    elif mask.ndim == 3:
        path = path.with_name(path.name + ".tif")
        tifffile.imwrite(path, mask)
    else:
        path = path.with_name(path.name + ".png")
        Image.fromarray(mask).save(path)
    return path


def without_suffix(name: str) -> str:
    """Take the suffix off a file's name, of NIfTI both."""
    for suffix in (*NIFTI[::-1], Path(name).suffix):
        if suffix and name.lower().endswith(suffix.lower()):
            return name[: -len(suffix)]
    return name


def _name(item: Any) -> str:
    if isinstance(item, Path):
        return str(item)
    return "a mask"


def _by(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
