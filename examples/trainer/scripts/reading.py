"""From files to a network's input and back, for transforms of MONAI."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.image_reader import PILReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.transform import MapTransform
from PIL import Image

from .files import NIFTI, PICTURES, is_nifti, is_picture, read_file
from .pixels import as_image, dimensions_of, normalised, on_grid, resize


def images_in(folder: str, *, volumes: bool) -> list[dict[str, str]]:
    """List the images below a folder as MONAI's data sets take them, in order.

    Args:
        folder: their folder.
        volumes: whether they are NIfTI; else they are pictures and DICOM files.

    Raises:
        ValueError: there are none.
    """
    is_wanted: Callable[[Path], bool] = is_picture
    wanted = ", ".join((*PICTURES, "DICOM"))
    if volumes:
        is_wanted, wanted = is_nifti, ", ".join(NIFTI)
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and is_wanted(path)]
    if not paths:
        raise ValueError(f"{folder} has no image ({wanted}). Name a folder with --dataset_dir.")
    return [{"image": str(path)} for path in paths]


class PictureReader(PILReader):
    """Reads pictures and DICOM files upright, as 8-bit grey or RGB.

    Values of more bits are stretched to 8; those of DICOM are shown as the file says.
    """

    def read(self, data: Any, **_: Any) -> Any:
        """Read one picture, or a list of them.

        Raises:
            ValueError: a file holds several frames.
        """
        paths = data
        if isinstance(data, (str, Path)):
            paths = [data]
        pictures = []
        for path in paths:
            pixels = as_image(read_file(Path(path)))
            if dimensions_of(pixels) != 2:
                raise ValueError(f"{path} holds several frames, and the network takes pictures")
            pictures.append(Image.fromarray(pixels))
        if len(pictures) == 1:
            return pictures[0]
        return pictures


class ToInputd(MapTransform, InvertibleTransform):
    """The pixels of a file to a network's input; its inverse brings outputs to the size of the file.

    Args:
        keys: of images (C, H, W), volumes (C, D, H, W), as they are in their files.
        stored: the size (H, W) or (D, H, W) at which images were kept in the training.
        size: of the input.
        mean: of red, green and blue, of values in [0, 1].
        std: likewise.
    """

    def __init__(
        self,
        keys: Any,
        stored: Sequence[int],
        size: Sequence[int],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__(keys)
        self.stored, self.size = tuple(stored), tuple(size)
        self.mean, self.std = list(mean), list(std)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the images; their affines stay those of the files' own voxels."""
        changed = dict(data)
        for key in self.key_iterator(changed):
            image = changed[key]
            # (C, …) → (…, C), grey without C
            values = image.as_tensor().movedim(0, -1).numpy()
            if values.shape[-1] == 1:
                values = values[..., 0]
            pixels = torch.tensor(resize(as_image(values), self.stored))
            # (…) → (1, …), (…, C) → (C, …)
            channels = pixels.reshape(*self.stored, -1).movedim(-1, 0)
            own = normalised(channels, self.size, self.mean, self.std)
            changed[key] = MetaTensor(own, meta=image.meta, applied_operations=image.applied_operations)
            whole = tuple(image.shape[1:])
            self.push_transform(changed[key], orig_size=whole)  # type: ignore[no-untyped-call]  # of MONAI
        return changed

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring outputs (S + 1, …) to the size that the image had."""
        changed = dict(data)
        for key in self.key_iterator(changed):
            whole = self.pop_transform(changed[key])["orig_size"]
            outputs = changed[key]
            own = on_grid(outputs.as_tensor()[None], [int(side) for side in whole])[0]
            changed[key] = MetaTensor(own, meta=outputs.meta, applied_operations=outputs.applied_operations)
        return changed
