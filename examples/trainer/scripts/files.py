"""Kinds of files, and pictures and DICOM as they are, before they are brought to 8 bit."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from .dicom import SUFFIXES as DICOM
from .dicom import looks_like_dicom, read_dicom

PICTURES: tuple[str, ...] = (
    ".bmp",
    ".gif",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
)

NIFTI = (".nii", ".nii.gz")


def is_nifti(item: object) -> bool:
    """Say whether something is the path of a NIfTI file."""
    return isinstance(item, Path) and item.name.lower().endswith(NIFTI)


def is_picture(path: Path) -> bool:
    """Say whether a file is read here: by its suffix, or, as a PACS writes them, DICOM without one."""
    if path.suffix.lower() in {*PICTURES, *DICOM}:
        return True
    nameless = path.suffix == "" or path.suffix[1:].isdigit()
    return nameless and looks_like_dicom(path)


def read_file(path: Path) -> npt.NDArray[np.generic]:
    """Decode a picture or a DICOM file.

    Raises:
        ImportError: it is DICOM, and pydicom is not installed.
        ValueError, OSError: it holds no pixels that can be read.
    """
    if path.suffix.lower() in DICOM or looks_like_dicom(path):
        return read_dicom(path)
    return read_picture(path)


def read_picture(path: Path) -> npt.NDArray[np.generic]:
    """Decode a picture as it is, before it is brought to 8 bit.

    Raises:
        ValueError: it holds several pages.
        OSError: it is none.
    """
    is_tiff = path.suffix.lower() in {".tif", ".tiff"}
    try:
        with Image.open(path) as opened:
            pages = getattr(opened, "n_frames", 1)
            if pages > 1:
                raise ValueError(f"it holds {pages} pages; store each in a file of its own")
            deep_colour = opened.mode.startswith("RGB") and ";16" in str(opened.tile)
            if not deep_colour:
                return pixels_of(opened)
            if not is_tiff:
                # Pillow keeps the upper 8 of 16 bits; a wider type has them stretched like others.
                return pixels_of(opened).astype(np.uint16)
    except UnidentifiedImageError:
        if not is_tiff:
            raise
    # Not all who read pictures have it.
    import tifffile

    return np.asarray(tifffile.imread(path))


def pixels_of(opened: Image.Image) -> npt.NDArray[np.generic]:
    """Decode what Pillow has opened: upright, grey or RGB, values deeper than 8 bit as they are."""
    image = ImageOps.exif_transpose(opened)
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode in {"1", "L", "LA"}:
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))
