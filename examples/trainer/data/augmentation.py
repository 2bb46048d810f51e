"""What changes training images at random: flips, turns, shifts, changes of light."""

import math
from dataclasses import dataclass
from typing import Any

from monai.transforms.compose import Compose
from monai.transforms.intensity.array import RandScaleIntensity
from monai.transforms.spatial.array import RandAffine, RandFlip
from monai.transforms.utility.array import Lambda
from torch import Tensor
from torchvision.transforms import v2


@dataclass(frozen=True)
class Strength:
    """How far an augmentation goes.

    Attributes:
        angle: in degrees.
        shift: as a share of the side.
        scale: of a volume, as a share.
        light: likewise.
        zoom: of an image, from and to.
        shear: in degrees.
    """

    angle: float = 10
    shift: float = 0.05
    scale: float = 0.1
    light: float = 0.2
    zoom: tuple[float, float] = (0.9, 1.1)
    shear: float | None = None

    def turn(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """Give the arguments of MONAI's affine transformation of volumes (D, H, W)."""
        return {
            "rotate_range": [math.radians(self.angle), 0, 0],
            "translate_range": [self.shift * side for side in shape],
            "scale_range": [self.scale] * 3,
            "padding_mode": "zeros",
        }


# "light": flips, small turns, shifts and changes of light are as likely in the next image of the same
# scanner, and no finding leaves the view. "strong": larger ones, blur too.
STRENGTHS = {"light": Strength(), "strong": Strength(25, 0.1, 0.25, 0.4, (0.8, 1.25), 5)}


def augmentation(strength: str, shape: tuple[int, ...]) -> Any:
    """Give what changes stored pixels (C, H, W) or (C, D, H, W) at random.

    torchvision's for images: they take a third of the time of MONAI's, or less, which are for volumes.

    Args:
        strength: "none", or of `STRENGTHS`.
        shape: (H, W) or (D, H, W).
    """
    if strength == "none":
        return v2.Identity()
    own = STRENGTHS[strength]
    if len(shape) == 3:
        turn = RandAffine(1.0, **own.turn(shape))
        return Compose([RandFlip(0.5, 2), turn, RandScaleIntensity(own.light, 1.0), Lambda(to_bytes)])
    drawn = [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(own.angle, (own.shift, own.shift), own.zoom, own.shear, interpolation=2),
        v2.ColorJitter(brightness=own.light, contrast=own.light),
    ]
    if strength == "strong":
        drawn.append(v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], 0.3))
    return v2.Compose(drawn)


def to_bytes(values: Tensor) -> Tensor:
    """Round to 8 bit; what is too bright is white, where a cast would wrap it around to black."""
    return values.round().clamp(0, 255).byte()
