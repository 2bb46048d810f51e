"""From a file's pixels to a network's input: brought to 8 bit, resized, normalised.

An image is (H, W) or (H, W, 3), a volume (D, H, W) or (D, H, W, 3).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from monai.transforms.spatial.array import Resize
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2

Bytes = npt.NDArray[np.uint8]


def as_image(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring decoded pixels of any depth to uint8, without an alpha channel.

    Raises:
        ValueError: they are neither an image nor a volume, grey or RGB.
    """
    if array.ndim >= 3 and array.shape[-1] == 4:
        array = array[..., :3]
    if array.ndim - int(is_colour(array)) not in (2, 3):
        raise ValueError(
            f"it has the shape {array.shape}; a grey or RGB image of shape (H, W) or (H, W, 3), or a volume, "
            "is needed"
        )
    if 0 in array.shape:
        raise ValueError("it has no pixels")
    return to_uint8(array)


def to_uint8(array: npt.NDArray[np.generic]) -> Bytes:
    """Bring one image to 8 bit.

    A file of 16 bits does not say how many of them the scanner used (12 are common), so an image deeper than
    8 bit is stretched from its own minimum to its own maximum. NaN becomes black, infinity black or white.
    """
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    stretched = (values - low) * (255 / max(high - low, 1e-12))
    return stretched.round().astype(np.uint8)


def resize(array: Bytes, size: Sequence[int]) -> Bytes:
    """Resize an image to (H, W), a volume to (D, H, W); nothing is cut off, which might be the finding."""
    if array.shape[: len(size)] == tuple(size):
        return array
    if len(size) == 2:
        return np.asarray(Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BICUBIC))
    # (D, H, W) or (D, H, W, C) → (C, D, H, W)
    channels = torch.from_numpy(array).reshape(*array.shape[:3], -1).movedim(-1, 0).float()
    resized = torch.as_tensor(Resize(size, mode="trilinear", anti_aliasing=True)(channels))
    # (C, D, H, W) → (D, H, W) or (D, H, W, C)
    values = resized.round().clamp(0, 255).byte().movedim(0, -1)
    return values.reshape(*size, *array.shape[3:]).numpy()


def normalised(pixels: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turn 8-bit pixels into a network's input: of its size, RGB, less the mean, by the deviation.

    Args:
        pixels: (…, C, H, W) or (…, C, D, H, W), uint8; C is 1 (grey) or 3 (RGB).
        size: of the input, (H, W) or (D, H, W).
        mean: of red, green and blue, of values in [0, 1].
        std: likewise.
    """
    if len(size) == 2:
        steps = [v2.Resize(size), v2.RGB(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
        image: Tensor = v2.Compose(steps)(pixels)
        return image
    # (…, 1 or 3, D, H, W) → (B, 1 or 3, D, H, W)
    values = pixels.reshape(-1, *pixels.shape[-4:]).float() / 255
    if tuple(values.shape[2:]) != tuple(size):
        values = interpolate(values, tuple(size), mode="trilinear")
    # (B, 1 or 3, D, H, W) → (B, 3, D, H, W)
    values = values.expand(-1, 3, -1, -1, -1)
    shift, scale = torch.tensor([mean, std]).reshape(2, 3, 1, 1, 1)
    # (B, 3, D, H, W) → (…, 3, D, H, W)
    volumes: Tensor = ((values - shift) / scale).reshape(*pixels.shape[:-4], 3, *size)
    return volumes


def on_grid(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Interpolate logits (B, S + 1, …) to the size of a mask."""
    if tuple(logits.shape[2:]) == tuple(size):
        return logits
    mode = {2: "bilinear", 3: "trilinear"}[len(size)]
    return interpolate(logits.float(), tuple(size), mode=mode, align_corners=False)


def dimensions_of(array: Bytes) -> int:
    """Say whether it is an image, 2, or a volume, 3."""
    return array.ndim - int(is_colour(array))


def require_dimensions(array: Bytes, dimensions: int, name: str = "it") -> None:
    """Raise a ValueError unless it is the image, 2, or the volume, 3, that a network takes."""
    words = {2: "an image", 3: "a volume"}
    found = dimensions_of(array)
    if found != dimensions:
        raise ValueError(f"{name} is {words[found]}, and the network takes {words[dimensions]}")


def is_colour(array: npt.NDArray[np.generic]) -> bool:
    """Say whether its last axis is one of colours."""
    return array.ndim > 2 and array.shape[-1] == 3
