"""Grey images, of one value or random, and files of them."""

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)


def grey(value=None, side=20):
    if value is not None:
        return np.full((side, side), value, np.uint8)
    return RNG.integers(0, 256, (side, side), dtype=np.uint8)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path
