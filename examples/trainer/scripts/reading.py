"""From files to a network's input and back, for transforms of MONAI."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.image_reader import PILReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.transform import MapTransform
from monai.utils.misc import ensure_tuple
from PIL import Image

from .files import NIFTI, PICTURES, is_nifti, is_picture, read_file
from .pixels import as_image, normalised, on_grid, require_dimensions, resize
from .volumes import VolumeReader, slice_or_volume

__all__ = ["PictureReader", "ToInputd", "VolumeReader", "images_in"]


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

    def read(self, data: Any, **_: Any) -> tuple[Any, ...]:
        """Give the paths of one file, or a list of them; `get_data` decodes.

        Where `read` fails, MONAI's `LoadImage` tries its other readers, which read files in other ways.
        The keywords that MONAI allows for are those of `Image.open`, which has no part in this.
        """
        paths: tuple[Any, ...] = ensure_tuple(data)
        return paths

    def get_data(self, img: Any) -> Any:
        """Decode what `read` gave; give the values and MONAI's metadata.

        Raises:
            ValueError: a file cannot be read, or holds several frames.
        """
        pictures = []
        for path in img:
            try:
                pixels = as_image(read_file(Path(path)))
                require_dimensions(pixels, 2)
            # Damaged files raise whatever their format's parser stumbles on.
            except Exception as error:
                raise ValueError(f"{path} could not be read as an image: {error}") from error
            pictures.append(Image.fromarray(pixels))
        return super().get_data(pictures)


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
        """Change the images; their affines stay those of the files' own voxels.

        Raises:
            ValueError: a volume has one slice.
        """
        changed = dict(data)
        for key in self.key_iterator(changed):
            image = changed[key]
            # (C, …) → (…, C), grey without C
            values = image.as_tensor().movedim(0, -1).numpy()
            if values.shape[-1] == 1:
                values = values[..., 0]
            if len(self.stored) == 3:
                values = slice_or_volume(values)
            array = as_image(values)
            require_dimensions(array, len(self.stored), image.meta["filename_or_obj"])
            pixels = torch.tensor(resize(array, self.stored))
            # (…) → (1, …), (…, C) → (C, …)
            channels = pixels.reshape(*self.stored, -1).movedim(-1, 0)
            inputs = normalised(channels, self.size, self.mean, self.std)
            changed[key] = MetaTensor(inputs, meta=image.meta, applied_operations=image.applied_operations)
            shape = tuple(image.shape[1:])
            self.push_transform(changed[key], orig_size=shape)  # type: ignore[no-untyped-call]  # of MONAI
        return changed

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Bring outputs (S + 1, …) to the size that the image had."""
        changed = dict(data)
        for key in self.key_iterator(changed):
            shape = self.pop_transform(changed[key])["orig_size"]
            outputs = changed[key]
            logits = on_grid(outputs.as_tensor()[None], [int(side) for side in shape])[0]
            changed[key] = MetaTensor(
                logits, meta=outputs.meta, applied_operations=outputs.applied_operations
            )
        return changed
