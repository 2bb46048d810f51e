"""One DICOM file as 8-bit pixels, as a viewer with the file's own window would show it. Needs pydicom."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIXES = {".dcm", ".dicom", ".ima"}

Pixels = npt.NDArray[np.float64]


def is_dicom(path: Path) -> bool:
    """Whether a file's name says that it is DICOM."""
    return path.suffix.lower() in SUFFIXES


def read_dicom(path: Path) -> npt.NDArray[np.generic]:
    """Decode an image of one frame: rescaled, windowed, and light where MONOCHROME1 says dark.

    Returns:
        (H, W) or (H, W, 3), uint8 where the file has a window; other values keep their own range.

    Raises:
        ImportError: pydicom is not installed.
        ValueError: the file holds several frames, or no pixels.
    """
    pydicom = _pydicom()
    header = pydicom.dcmread(path)
    frames = int(header.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"it holds {frames} frames; store each in a file of its own")
    if "PixelData" not in header:
        raise ValueError("it holds no pixels")
    # In colour, pydicom gives RGB whatever the file's own colour space.
    pixels = np.asarray(header.pixel_array)
    if pixels.ndim == 3:
        return pixels
    shown = _windowed(header, pydicom.pixels.apply_modality_lut(pixels, header).astype(np.float64))
    if header.get("PhotometricInterpretation") == "MONOCHROME1":
        shown = 255 - shown if shown.dtype == np.uint8 else shown.max() + shown.min() - shown
    return shown


def patient_of(path: Path) -> str:
    """Give the patient's number, empty where the file has none or cannot be read."""
    try:
        header = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID") or "")
    # A damaged file is told of where its pixels are read.
    except Exception:
        return ""


def _windowed(header: Any, values: Pixels) -> npt.NDArray[np.generic]:
    """Apply the first window of the file (DICOM PS3.3 C.11.2.1.2 and .3), if it has one."""
    if "WindowCenter" not in header or "WindowWidth" not in header:
        return values
    center, width = (float(np.atleast_1d(header[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
    kind = header.get("VOILUTFunction", "LINEAR")
    if kind == "SIGMOID":
        share = 1 / (1 + np.exp(-4 * (values - center) / width))
    elif kind == "LINEAR_EXACT":
        share = (values - center) / width + 0.5
    else:
        share = (values - (center - 0.5)) / max(width - 1, 1e-6) + 0.5
    eight_bit: npt.NDArray[np.uint8] = (255 * share.clip(0, 1)).round().astype(np.uint8)
    return eight_bit


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError("pydicom is not installed: pip install pydicom (the 'dicom' extra)") from error
    return pydicom
