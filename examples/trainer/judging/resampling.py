"""How sure scores are: the test's patients drawn anew, with replacement (Efron & Tibshirani, 1993).

Images of one patient resemble each other, so they are drawn together or not at all: a bootstrap of groups.
Drawn image by image, an interval would be too narrow.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from .quick import Floats

Numbers = Callable[[Floats], dict[str, Floats]]
AT_ONCE = 4_000_000  # counts in memory
FEWEST = 20  # groups below which an interval is only a hint


def draws_of(groups: npt.NDArray[np.integer], draws: int, seed: int) -> Iterator[Floats]:
    """Yield counts (D, N): how often each of N images is in each draw, for all draws in a few blocks.

    Args:
        groups: (N,), images with one number are drawn together.
        draws: of as many groups as there are.
        seed: of the draws.
    """
    _, place = np.unique(groups, return_inverse=True)
    count = int(place.max()) + 1
    generator = np.random.default_rng(seed)
    block = max(1, AT_ONCE // len(place))
    for start in range(0, draws, block):
        several = min(block, draws - start)
        drawn = generator.multinomial(count, np.full(count, 1 / count), several)
        # (D, groups) → (D, N)
        yield drawn[:, place].astype(float)


def intervals(
    numbers: Numbers, groups: npt.NDArray[np.integer], draws: int, seed: int
) -> dict[str, list[float]]:
    """Give the 95 % interval of each number, over the draws in which it is defined.

    Args:
        numbers: turns counts (D, N) into numbers (D,) by their names.
        groups: (N,), images with one number are drawn together.
        draws: how many.
        seed: of the draws.
    """
    found: dict[str, list[Floats]] = {}
    for counts in draws_of(groups, draws, seed):
        for name, values in numbers(counts).items():
            found.setdefault(name, []).append(values)
    result = {}
    for name, blocks in found.items():
        values = np.concatenate(blocks)
        values = values[np.isfinite(values)]
        result[name] = [float("nan")] * 2
        if len(values):
            result[name] = np.quantile(values, [0.025, 0.975]).tolist()
    return result


def describe_draws(bootstrap: dict[str, Any]) -> str:
    """Say what intervals rest on, such as "95 % intervals: 1000 draws of 40 groups of 117 images"."""
    images, groups = bootstrap["images"], bootstrap["groups"]
    what = f"{images} images"
    if groups < images:
        what = f"the {groups} groups (patients, copies) of {images} images"
    text = f"95 % intervals: {bootstrap['draws']} draws of {what}"
    if groups < FEWEST:
        text += "; so few make them a hint, no more"
    return text
