"""Which images make up which step: a function of the seed and the epoch alone.

So a run goes on in the middle of an epoch as if it had never stopped, and the images of a step are the same on one device
and on many, with and without gradient accumulation.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from .images import Integers

Key = tuple[int, int]  # the place of an image in its part, and the seed of its augmentation
FILLER = -1  # the seed of an image that only fills up a micro-batch: it has no part in the loss
IGNORED = -100  # its label, which torch's cross entropy leaves out


class Order(Sampler[list[Key]]):
    """The micro-batches that one process computes in one epoch.

    A last step of a single image is left out, unless it is the only one: BatchNorm that adapts cannot take statistics from
    one image of 1 × 1 features. For the same reason a micro-batch with fewer than two images is filled up.

    Args:
        count: images of the training part.
        batch_size: images of a step, over all processes and micro-batches.
        seed: of the run.
        accumulate: micro-batches of a step.
        rank: of this process.
        world: number of processes.
        balance: (count,) how often each image is drawn, relative to the others; None for every image once.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        balance: np.ndarray | None = None,
    ) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.accumulate, self.rank, self.world, self.balance = accumulate, rank, world, balance
        whole, rest = divmod(count, batch_size)
        self.steps = whole + (rest >= 2 or (rest == 1 and whole == 0))
        self.begin(1)

    def begin(self, epoch: int, step: int = 0) -> None:
        """Stand before a step, counted from 0, of an epoch, counted from 1."""
        self.epoch, self.start = epoch, step
        self._drawn = self._draw()

    def images(self, step: int) -> Integers:
        """Give the places of all images of a step, over all processes."""
        return self._drawn[step * self.batch_size : (step + 1) * self.batch_size]

    def __len__(self) -> int:
        return (self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        seeds = np.random.default_rng([self.seed, self.epoch, 1]).integers(2**62, size=self.count)
        parts = self.world * self.accumulate
        for step in range(self.start, self.steps):
            places = range(step * self.batch_size, min((step + 1) * self.batch_size, self.count))
            filler = (int(self._drawn[places[0]]), FILLER)
            for part in range(self.rank, parts, self.world):
                keys = [(int(self._drawn[i]), int(seeds[i])) for i in places[part::parts]]
                yield keys + [filler] * (2 - len(keys) if parts > 1 else 0)

    def _draw(self) -> Integers:
        generator = np.random.default_rng([self.seed, self.epoch])
        if self.balance is None:
            return generator.permutation(self.count)
        return generator.choice(self.count, self.count, p=self.balance / self.balance.sum())


def step_seed(seed: int, epoch: int, step: int, rank: int = 0, part: int = 0) -> int:
    """Give the seed of what a model draws, dropout say, in one micro-batch of a step on one process."""
    return int(np.random.SeedSequence([seed, epoch, step, rank, part]).generate_state(1, np.uint64)[0] >> 1)


def balanced(labels: Integers) -> np.ndarray:
    """Give (N,) weights by which every class is drawn equally often."""
    return 1.0 / np.bincount(labels)[labels]
