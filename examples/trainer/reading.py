"""Many image files at once: decoded side by side, and those that cannot be read named all together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.contrib.concurrent import thread_map

from .dicom import is_dicom, patient_of
from .errors import TrainerError
from .images import Bytes, Integers, digest, read_image, resize, stack

SHOWN = 5  # broken images that a message names


@dataclass(frozen=True)
class Reading:
    """How to read a data set.

    Attributes:
        size: the side in pixels at which images are kept; their height, where a width is given.
        patient_column: of a table: rows that must stay together.
        group_column: of a table: subgroups of patients whose scores are told apart.
        skip_broken: leave out images that cannot be read.
        quiet: show no progress.
        width: in pixels, None for squares.
    """

    size: int
    patient_column: str = "patient"
    group_column: str | None = None
    skip_broken: bool = False
    quiet: bool = False
    width: int | None = None


@dataclass(frozen=True)
class Loaded:
    """The images that could be read.

    Attributes:
        pixels: (N, C, size, size), uint8.
        rows: (N,) their places among those that were asked for.
        digests: of the N originals.
        patients: of the N originals, from their DICOM header; else a name of its own for each.
        broken: what is wrong with each of the others.
    """

    pixels: Tensor
    rows: Integers
    digests: list[str]
    patients: list[str]
    broken: list[str]

    def of(self, column: Sequence[str]) -> list[str]:
        """Give a column's values for the images that could be read."""
        return [column[i] for i in self.rows]


def load_images(paths: Sequence[Path], reading: Reading) -> Loaded:
    """Decode files.

    Raises:
        TrainerError: some cannot be read, and `skip_broken` is not set; or none can.
    """
    return load(paths, lambda path: (read_image(path), _patient(path)), reading)


def load(items: Sequence[Any], decode: Callable[[Any], tuple[Bytes, str]], reading: Reading) -> Loaded:
    """Decode anything by a function that gives the pixels, (H, W) or (H, W, 3), and the patient.

    Raises:
        TrainerError: as `load_images`.
    """

    def attempt(item: Any) -> tuple[Bytes, str, str] | str:
        try:
            array, patient = decode(item)
        except TrainerError as error:
            return str(error)
        return resize(array, reading.size, reading.width), digest(array), patient

    decoded = thread_map(
        attempt, items, max_workers=4, desc="reading images", unit="image", leave=False, disable=reading.quiet
    )
    found = [(row, one) for row, one in enumerate(decoded) if not isinstance(one, str)]
    broken = [one for one in decoded if isinstance(one, str)]
    if broken and not (reading.skip_broken and found):
        raise TrainerError(_complaint(broken, len(decoded)))
    rows, read = zip(*found, strict=True)
    arrays = [array for array, _, _ in read]
    if any(array.ndim == 3 for array in arrays):
        arrays = [a if a.ndim == 3 else np.repeat(a[..., None], 3, axis=2) for a in arrays]
    patients = [patient or f"image {row}" for row, (_, _, patient) in found]
    return Loaded(stack(arrays), np.array(rows), [one[1] for one in read], patients, broken)


def _complaint(broken: list[str], count: int) -> str:
    if len(broken) == 1:
        return f"{broken[0]} Or leave it out with --skip-broken." if count > 1 else broken[0]
    shown = "\n  ".join(broken[:SHOWN])
    more = f"\n  and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
    hint = "" if len(broken) == count else "\nLeave them out with --skip-broken."
    return f"{len(broken)} of {count} images cannot be read:\n  {shown}{more}{hint}"


def _patient(path: Path) -> str:
    return patient_of(path) if is_dicom(path) else ""
