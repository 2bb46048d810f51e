"""Images with their masks, changed together: flipped, turned and cut alike."""

import warnings
from typing import Any

import torch
from monai.transforms.compose import Compose
from monai.transforms.croppad.dictionary import RandCropByPosNegLabeld
from monai.transforms.intensity.dictionary import RandScaleIntensityd
from monai.transforms.spatial.dictionary import RandAffined, RandFlipd
from monai.transforms.utility.dictionary import Lambdad
from torch import Tensor
from torchvision import tv_tensors

from ..files.images import Integers
from ..files.mask_files import resize_mask
from ..settings import Settings
from .augmentation import STRENGTHS, augmentation, to_bytes
from .batches import Batch, Key, Part, Preprocessing
from .rows import Images

BOTH = ("image", "mask")


class MaskedPart(Part):
    """One part of a split: inputs, with their masks and the sides of a pixel.

    Asked for by its place, an image comes with its mask as it is stored. Asked for by its place and the
    epoch, both are augmented, brought to the size of the input and, if `patch` is given, cut to a crop.
    """

    def __init__(
        self,
        images: Images,
        rows: Integers,
        preprocessing: Preprocessing,
        augment: str = "none",
        seed: int = 0,
        patch: int | None = None,
    ) -> None:
        super().__init__(images, rows, preprocessing, seed=seed)
        self.labels, self.sides = self.targets
        self.augment = joint_augmentation(augment, preprocessing.stored)
        self.crop: Any = None
        if patch is not None:
            size = [patch] * len(preprocessing.stored)
            # As many crops around a voxel of a structure as around one of the background.
            self.crop = RandCropByPosNegLabeld(BOTH, "mask", size, pos=1, neg=1, num_samples=1)

    def __getitem__(self, key: int | Key) -> Batch:
        if isinstance(key, int):
            return self.preprocessing(self.pixels[key]), (self.labels[key], self.sides[key])
        place = key[0]
        with self.drawing(*key) as drawn:
            pixels, labels = self._changed(self.pixels[place], self.labels[place])
            size = self.preprocessing.input_shape
            image, mask = self.preprocessing(pixels), resize_mask(labels, size)
            if self.crop is not None:
                image, mask = self._cut(image, mask, drawn)
        return image, (mask, self.sides[place])

    def _cut(self, image: Tensor, mask: Tensor, drawn: int) -> tuple[Tensor, Tensor]:
        self.crop.set_random_state(drawn)
        with warnings.catch_warnings():
            # In an empty mask, and in a full one, there is no choice.
            warnings.filterwarnings("ignore", message="Num foregrounds")
            one = self.crop({"image": image, "mask": mask[None]})[0]
        return one["image"].as_tensor(), one["mask"].as_tensor()[0]

    def _changed(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.augment, Compose):
            changed = self.augment({"image": pixels, "mask": labels[None]})
            return torch.as_tensor(changed["image"]), torch.as_tensor(changed["mask"])[0].to(labels.dtype)
        image, mask = self.augment(tv_tensors.Image(pixels), tv_tensors.Mask(labels))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def joint_augmentation(strength: str, shape: tuple[int, ...]) -> Any:
    """Give what changes stored pixels and masks together; torchvision knows a mask by its type."""
    if strength == "none" or len(shape) == 2:
        return augmentation(strength, shape)
    own = STRENGTHS[strength]
    turn = RandAffined(BOTH, prob=1.0, mode=("bilinear", "nearest"), **own.turn(shape))
    brighter = RandScaleIntensityd("image", own.light, prob=1.0)
    return Compose([RandFlipd(BOTH, 0.5, 2), turn, brighter, Lambdad("image", to_bytes)])


def masked_parts(
    images: Images, found: dict[str, Integers], preprocessing: Preprocessing, settings: Settings
) -> dict[str, Part]:
    """Make the parts of a split; only the training part is augmented and cut."""
    parts: dict[str, Part] = {}
    for part, rows in found.items():
        augment, patch = "none", None
        if part == "train":
            augment, patch = str(settings.augment), settings.patch_size
        parts[part] = MaskedPart(images, rows, preprocessing, augment, settings.seed, patch)
    return parts
