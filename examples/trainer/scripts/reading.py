"""From files to a network's input and back, for transforms of MONAI."""

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.data.image_reader import PILReader
from monai.data.meta_tensor import MetaTensor
from monai.transforms.inverse import InvertibleTransform
from monai.transforms.transform import MapTransform
from PIL import Image

from .pixels import as_image, normalised, on_grid, read_picture, resize


def images_in(folder: str, suffixes: Sequence[str]) -> list[dict[str, str]]:
    """List the images below a folder as MONAI's data sets take them, in order.

    Raises:
        ValueError: there are none.
    """
    endings = tuple(suffixes)
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.name.lower().endswith(endings)]
    if not paths:
        raise ValueError(f"{folder} has no image ({', '.join(suffixes)}). Name a folder with --dataset_dir.")
    return [{"image": str(path)} for path in paths]


class PictureReader(PILReader):
    """Reads pictures upright, as 8-bit grey or RGB; values of more bits are stretched to 8."""

    def read(self, data: Any, **_: Any) -> Any:
        """Read one picture, or a list of them."""
        paths = data
        if isinstance(data, (str, Path)):
            paths = [data]
        pictures = [Image.fromarray(as_image(read_picture(Path(path)))) for path in paths]
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
