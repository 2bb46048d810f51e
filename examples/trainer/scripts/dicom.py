"""DICOM files as 8-bit pixels, as a viewer with the file's own window would show them. Needs pydicom."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SUFFIXES = {".dcm", ".dicom", ".ima"}

Pixels = npt.NDArray[np.float64]


def looks_like_dicom(path: Path) -> bool:
    """Say whether a file is DICOM by its content."""
    try:
        with path.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_dicom(path: Path) -> npt.NDArray[np.generic]:
    """Decode an image, or a file of several frames as a volume.

    Returns:
        (H, W), (H, W, 3), (D, H, W) or (D, H, W, 3): uint8 where the file says how it is shown; other values
        keep their own range, with NaN where the file has padding.

    Raises:
        ImportError: pydicom is not installed.
        ValueError: the file holds no pixels.
    """
    return shown(_pydicom().dcmread(path, force=path.suffix.lower() in SUFFIXES))


def read_series(folder: Path) -> npt.NDArray[np.generic]:
    """Decode a folder of slices of one series as a volume (D, H, W), in their order along the patient.

    Raises:
        ValueError: it holds no slices, several series, or slices of several sizes.
    """
    pydicom = _pydicom()
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and looks_like_dicom(path)]
    headers = [pydicom.dcmread(path) for path in files]
    series = {str(header.get("SeriesInstanceUID", "")) for header in headers}
    if len(series) != 1:
        raise ValueError(f"the folder holds DICOM files of {len(series)} series; one is needed")
    slices = [shown(header) for header in sorted(headers, key=_place)]
    shapes = {one.shape for one in slices}
    if len(shapes) != 1:
        raise ValueError(f"its slices have {len(shapes)} shapes, such as {min(shapes)} and {max(shapes)}")
    volume = np.stack(slices)
    return volume.squeeze(0) if len(slices) == 1 else volume


def shown(header: Any) -> npt.NDArray[np.generic]:
    """Give the pixels of an opened file as a viewer shows them: rescaled, windowed, MONOCHROME1 inverted."""
    pixels_module = _pydicom().pixels
    if "PixelData" not in header:
        raise ValueError("it holds no pixels")
    _bring_up_functional_groups(header)
    # In colour, pydicom gives RGB whatever the file's own colour space.
    pixels = np.asarray(header.pixel_array)
    kind = header.get("PhotometricInterpretation")
    if kind == "PALETTE COLOR":
        coloured = pixels_module.apply_color_lut(pixels, header)
        # A palette of 16 bits uses all of them: 65535 is 255.
        if coloured.dtype != np.uint8:
            coloured = (coloured / 257).round()
        return np.asarray(coloured, np.uint8)
    if int(header.get("SamplesPerPixel") or 1) > 1:
        return pixels
    values = pixels_module.apply_modality_lut(pixels, header).astype(np.float64)
    share = _shown_by_table(header, values)
    if share is None:
        share = _shown_by_window(header, values)
    if share is None and int(header.get("BitsStored") or 0) == 8 and np.array_equal(values, pixels):
        share = (values - values.min().clip(max=0)) / 255
    if kind == "MONOCHROME1":
        values = -values
    if share is None:
        return _without_padding(header, pixels, values)
    if kind == "MONOCHROME1":
        share = 1 - share
    eight_bit: npt.NDArray[np.uint8] = (255 * share).round().astype(np.uint8)
    return eight_bit


def patient_of(path: Path) -> str:
    """Give the patient's number, empty where the file is no DICOM, has none, or cannot be read."""
    try:
        if path.is_dir():
            path = min(child for child in path.iterdir() if looks_like_dicom(child))
        elif not (path.suffix.lower() in SUFFIXES or looks_like_dicom(path)):
            return ""
        header = _pydicom().dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID") or "")
    # A damaged file is told of where its pixels are read.
    except Exception:
        return ""


def pixel_sides(path: Path) -> tuple[float, ...] | None:
    """Give the sides in mm of the pixels (Y, X) of one image, None where no such file tells them."""
    if not path.is_file() or not (path.suffix.lower() in SUFFIXES or looks_like_dicom(path)):
        return None
    tags = ["PixelSpacing", "NumberOfFrames"]
    header = _pydicom().dcmread(path, force=True, stop_before_pixels=True, specific_tags=tags)
    sides = header.get("PixelSpacing")
    if not sides or int(header.get("NumberOfFrames") or 1) > 1:
        return None
    return float(sides[0]), float(sides[1])


def _place(header: Any) -> tuple[float, float]:
    """Give a slice's place along the normal of its plane, else its number."""
    number = float(header.get("InstanceNumber") or 0)
    position, axes = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if not position or not axes:
        return 0.0, number
    directions = np.array(axes, dtype=np.float64)
    normal = np.cross(directions[:3], directions[3:])
    return float(normal @ np.array(position, dtype=np.float64)), number


def _bring_up_functional_groups(header: Any) -> None:
    """Let an enhanced file of several frames say its rescaling and window where others do."""
    groups = [*header.get("SharedFunctionalGroupsSequence", [])]
    groups += [*header.get("PerFrameFunctionalGroupsSequence", [])][:1]
    for group in groups:
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in group.get(name, []):
                for element in item:
                    if element.tag not in header:
                        header.add(element)


def _shown_by_table(header: Any, values: Pixels) -> Pixels | None:
    """Apply the VOI LUT Sequence (DICOM PS3.3 C.11.2.1.1), if the file has one; give shares of its range."""
    tables = header.get("VOILUTSequence")
    if not tables:
        return None
    whole = values.round().astype(np.int64)
    bits = int(tables[0].LUTDescriptor[2])
    output = np.asarray(_pydicom().pixels.apply_voi(whole, header), dtype=np.float64)
    share: Pixels = (output / (2**bits - 1)).clip(0, 1)
    return share


def _shown_by_window(header: Any, values: Pixels) -> Pixels | None:
    """Apply the first window (DICOM PS3.3 C.11.2.1.2), if the file has one; give shares of its range."""
    centers, widths = header.get("WindowCenter"), header.get("WindowWidth")
    # Some files have the tags without a value.
    if centers is None or widths is None or np.size(centers) == 0 or np.size(widths) == 0:
        return None
    window = _pydicom().pixels.apply_windowing
    # What it makes of values far outside the window is the range of what it gives.
    with np.errstate(over="ignore"):
        output = window(values, header)
        low, high = window(np.array([-1e12, 1e12]), header)
    share: Pixels = ((output - low) / (high - low)).clip(0, 1)
    return share


def _without_padding(header: Any, pixels: npt.NDArray[np.generic], values: Pixels) -> Pixels:
    """Mark the padding around a scan, which would take most of the range of grey, as no value."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return values
    last = header.get("PixelPaddingRangeLimit", first)
    low, high = min(first, last), max(first, last)
    padding = (pixels >= low) & (pixels <= high)
    return np.where(padding, np.nan, values)


def _pydicom() -> Any:
    try:
        import pydicom
        import pydicom.pixels
    except ImportError as error:
        raise ImportError("pydicom is not installed: pip install pydicom (the 'dicom' extra)") from error
    return pydicom
