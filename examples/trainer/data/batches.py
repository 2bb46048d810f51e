"""From pixels in memory to batches for the model: augmentation, size, normalisation, order."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lightning
import numpy as np
import torch
from monai.transforms.compose import Compose
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ..errors import TrainerError
from ..files.images import Integers
from ..scripts.pixels import normalised
from ..settings import Settings
from .augmentation import augmentation
from .rows import Images

Key = tuple[int, int]  # the place of an image in its part, and the epoch
Batch = tuple[Tensor, Any]  # inputs, and targets as the task takes them


@dataclass(frozen=True)
class Preprocessing:
    """How a file becomes the model's input: decoded to 8 bit (`images.py`), resized, normalised.

    It travels in the adapter's metadata, and `predict.py` repeats it.

    Attributes:
        stored: height and width, of a volume depth too, at which images were kept in memory.
        image_size: the side of the model's input.
        mean: of red, green and blue, of values in [0, 1].
        std: likewise.
    """

    stored: tuple[int, ...]
    image_size: int
    mean: list[float]
    std: list[float]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the input, without channels."""
        return (self.image_size,) * len(self.stored)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn stored pixels (…, C, H, W) or (…, C, D, H, W), uint8, into the input: RGB and normalised."""
        return normalised(pixels, self.input_shape, self.mean, self.std)

    def to_metadata(self) -> dict[str, Any]:
        """Give plain values for a file's header."""
        return {**asdict(self), "stored": list(self.stored)}

    @classmethod
    def from_metadata(cls, metadata: dict[str, Any], source: object) -> "Preprocessing":
        """Read what `to_metadata` gave, under "preprocessing".

        Raises:
            TrainerError: the metadata are not those of a run of train.py.
        """
        try:
            found = metadata["preprocessing"]
            stored = tuple(int(side) for side in found["stored"])
            return cls(stored, found["image_size"], list(found["mean"]), list(found["std"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TrainerError(
                f"{source} does not say how images become input: its metadata have no whole 'preprocessing'. "
                "Take an adapter that train.py wrote."
            ) from error


class Part(Dataset[Batch]):
    """One part of a split: inputs with their targets.

    An image is asked for by its place, or by its place and the epoch, which decide its augmentation in
    whichever process. Where views are few, the epoch is one of the first.
    """

    def __init__(
        self,
        images: Images,
        rows: Integers,
        preprocessing: Preprocessing,
        augment: str = "none",
        seed: int = 0,
    ) -> None:
        self.pixels = images.pixels[torch.from_numpy(rows)]
        self.targets = images.targets[torch.from_numpy(rows)]
        self.strata = torch.from_numpy(images.strata[rows])
        self.preprocessing, self.seed = preprocessing, seed
        self.augment = augmentation(augment, preprocessing.stored)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, key: int | Key) -> Batch:
        if isinstance(key, int):
            return self.preprocessing(self.pixels[key]), self.targets[key]
        with self.drawing(*key):
            changed = torch.as_tensor(self.augment(self.pixels[key[0]]))
        return self.preprocessing(changed), self.targets[key[0]]

    @contextmanager
    def drawing(self, place: int, epoch: int) -> Iterator[int]:
        """Draw at random as it follows from the run's seed, an image and an epoch; give the seed."""
        drawn = int(np.random.SeedSequence([self.seed, epoch, place]).generate_state(1)[0])
        if isinstance(self.augment, Compose):
            self.augment.set_random_state(drawn)
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too, and with them the model's dropout.
            torch.default_generator.manual_seed(drawn)
            yield drawn


class FeaturePart(Dataset[Batch]):
    """One part of a split: features with their targets, asked for as in `Part`.

    Args:
        features: of the views of an image, one after another, and of all images.
        rows: the images of this part among them.
        part: their targets.
        views: of each image.
    """

    def __init__(self, features: Sequence[Tensor], rows: Integers, part: Part, views: int = 1) -> None:
        self.features, self.rows, self.views = features, rows, views
        self.targets, self.strata = part.targets, part.strata

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: int | Key) -> Batch:
        place, view = (key, 0) if isinstance(key, int) else key
        row = int(self.rows[place]) * self.views + view % self.views
        return self.features[row][0], self.targets[place]


class EpochOrder(DistributedSampler[Any]):
    """The order of the training images: a function of seed and epoch alone, so that a run can go on.

    Args:
        part: of the split.
        seed: of the run.
        world: number of processes; each takes every `world`-th image.
        rank: of this one.
        balance: draw every class (or stratum) equally often, with replacement.
        views: of each image, which the epochs take in turn; None for a new one every epoch.
        repeat: times that an epoch goes through the images, each in an order and with a view of its own.
    """

    def __init__(
        self,
        part: Part | FeaturePart,
        seed: int,
        world: int,
        rank: int,
        balance: bool,
        views: int | None = None,
        repeat: int = 1,
    ) -> None:
        super().__init__(part, world, rank, seed=1000 * seed)
        self.views, self.repeat = views, repeat
        counts = torch.bincount(part.strata)
        self.weights = 1.0 / counts[part.strata]
        self.balance = balance

    def __len__(self) -> int:
        return self.num_samples * self.repeat

    def __iter__(self) -> Iterator[Key]:
        for turn in range(self.epoch * self.repeat, (self.epoch + 1) * self.repeat):
            view = turn if self.views is None else turn % self.views
            for place in self._order(turn):
                yield place, view

    def _order(self, turn: int) -> list[int]:
        """Give the places that this process takes when it goes through the images once."""
        generator = torch.Generator().manual_seed(self.seed + turn)
        if self.balance:
            drawn = torch.multinomial(self.weights, self.total_size, True, generator=generator)
        else:
            drawn = torch.randperm(len(self.weights), generator=generator)
            # The last round of the processes is filled up with the first images.
            drawn = drawn.repeat(-(-self.total_size // len(drawn)))[: self.total_size]
        places: list[int] = drawn[self.rank :: self.num_replicas].tolist()
        return places


class DataModule(lightning.LightningDataModule):
    """The parts of a split in batches; only the training part is shuffled."""

    def __init__(self, parts: dict[str, Part] | dict[str, FeaturePart], settings: Settings) -> None:
        super().__init__()
        self.parts, self.settings = parts, settings

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batch the training part; `batch_size` counts the images of a step over all processes."""
        world, rank = self._process()
        part, settings = self.parts["train"], self.settings
        order = EpochOrder(
            part, settings.seed, world, rank, settings.balanced_sampler, settings.views, settings.repeat
        )
        size = settings.batch_size // (settings.accumulate * world)
        # BatchNorm that adapts cannot take statistics from one image of 1 × 1 features.
        lonely = len(order) > size and len(order) % size == 1
        return DataLoader(part, size, sampler=order, num_workers=settings.num_workers, drop_last=lonely)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batch the validation part."""
        return self._plain("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Batch the test part."""
        return self._plain("test")

    def _plain(self, name: str) -> DataLoader[Batch]:
        world, rank = self._process()
        part = self.parts[name]
        order = None
        if world > 1:
            order = DistributedSampler[Batch](part, world, rank, shuffle=False)
        size = max(1, self.settings.batch_size // world)
        return DataLoader(part, size, sampler=order, num_workers=self.settings.num_workers)

    def _process(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.world_size, self.trainer.global_rank
