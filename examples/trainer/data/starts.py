"""Starts that look at images before the training: LoRA's `init=eva`, from what enters its layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files.images import Integers
from ..settings import Settings
from .batches import Preprocessing
from .rows import Images

LOOKED_AT = 128  # images at most
AT_ONCE = 32


def looks_at_images(options: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a method starts from what enters its layers, perhaps at some places alone."""
    init = options.get("lora", {}).get("init")
    if isinstance(init, dict):
        return "eva" in init.values()
    return init == "eva"


def batches(
    images: Images, rows: Integers, preprocessing: Preprocessing, settings: Settings
) -> Iterator[Tensor]:
    """Yield training images as the model takes them, without augmentation; which ones follows from the seed.

    Args:
        images: the data.
        rows: the positions of the training images.
        preprocessing: of an image before the model.
        settings: of the run; with a patch size, the middle of each image is taken.
    """
    chosen = np.random.default_rng(settings.seed).permutation(rows)[:LOOKED_AT]
    side = settings.patch_size or preprocessing.image_size
    first = (preprocessing.image_size - side) // 2
    for places in torch.from_numpy(chosen).split(AT_ONCE):
        inputs = preprocessing(images.pixels[places])
        for axis in range(2, inputs.ndim):
            inputs = inputs.narrow(axis, first, side)
        yield inputs
