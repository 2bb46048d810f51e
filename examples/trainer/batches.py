"""From pixels in memory to batches for the model: augmentation, size, normalisation."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

from .images import Images, Integers
from .order import FILLER, IGNORED, Key, Order

Batches = DataLoader[tuple[Tensor, Tensor]]

AUGMENTATIONS = ("none", "light", "strong")


class Part(Dataset[tuple[Tensor, Tensor]]):
    """One part of a split: images (3, size, size), float32 and normalised, with their labels.

    An image is asked for by its place, or by its place and the seed of its augmentation, which then draws the same in
    whichever process.
    """

    def __init__(self, images: Images, rows: Integers, transform: v2.Transform) -> None:
        self.pixels = images.pixels[torch.from_numpy(rows)]
        self.labels = torch.from_numpy(images.labels[rows])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            return self.transform(self.pixels[key]), self.labels[key]
        place, seed = key
        with torch.random.fork_rng(devices=[]):
            # Not torch.manual_seed, which would seed the GPUs too, and with them the model's dropout.
            torch.default_generator.manual_seed(abs(seed))
            image = self.transform(self.pixels[place])
        return image, self.labels[place] if seed != FILLER else torch.tensor(IGNORED)


def make_transform(size: int, mean: list[float], std: list[float], augment: str = "none") -> v2.Transform:
    """Prepare uint8 pixels (C, H, W) for a model of that input size, mean and std.

    Args:
        size: the side of the input in pixels.
        mean: of red, green and blue, of values in [0, 1].
        std: likewise.
        augment: "light": flips, small turns, shifts and changes of light are as likely in the next image of the same
            scanner, and no finding leaves the view. "strong": larger ones, blur too. "none": nothing is drawn.
    """
    drawn = {
        "none": [],
        "light": [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=2),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
        ],
        "strong": [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(25, translate=(0.1, 0.1), scale=(0.8, 1.25), shear=5, interpolation=2),
            v2.ColorJitter(brightness=0.4, contrast=0.4),
            v2.RandomApply([v2.GaussianBlur(5, (0.1, 1.5))], 0.3),
        ],
    }
    return v2.Compose(
        [
            *drawn[augment],
            v2.Resize((size, size)),
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def training_batches(part: Dataset[tuple[Tensor, Tensor]], order: Order, workers: int) -> Batches:
    """Batch the training part in its order."""
    return DataLoader(part, batch_sampler=order, num_workers=workers)


def plain_batches(
    part: Dataset[tuple[Tensor, Tensor]], batch_size: int, workers: int = 0, rank: int = 0, world: int = 1
) -> Batches:
    """Batch a part as it is; of several processes, each takes every `world`-th image."""
    sampler: DistributedSampler[tuple[Tensor, Tensor]] | None = (
        DistributedSampler(part, world, rank, shuffle=False) if world > 1 else None
    )
    return DataLoader(part, batch_size, sampler=sampler, num_workers=workers)
