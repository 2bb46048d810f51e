"""Volumes in NIfTI files; what holds more or less than one is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from monai.data.image_reader import NibabelReader
from monai.utils.misc import ensure_tuple


class VolumeReader(NibabelReader):
    """MONAI's reader of NIfTI, for files that hold one volume (X, Y, Z)."""

    # Not in `read`: where that fails, MONAI's `LoadImage` tries its other readers.
    def get_data(self, img: Any) -> tuple[npt.NDArray[np.generic], dict[str, Any]]:
        """Give the values of one opened file, or a list of them, and where they lie.

        Raises:
            ValueError: a file holds several volumes, channels, or less than a volume.
        """
        for file, image in zip(self.filenames, ensure_tuple(img), strict=True):
            if len(image.shape) != 3:
                raise ValueError(
                    f"{Path(file).name} has the shape {image.shape}; one volume (X, Y, Z) is needed"
                )
        values, meta = super().get_data(img)
        return np.asarray(values), meta


def slice_or_volume(volume: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """Take a volume (Z, Y, X) of one slice for an image (Y, X); give others as they are."""
    if len(volume) == 1:
        volume = volume[0]
    return volume
