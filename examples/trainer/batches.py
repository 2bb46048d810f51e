"""From pixels in memory to batches for the model: light augmentation, size, normalisation."""

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2  # type: ignore[import-untyped]

from .images import Images, Integers

Batches = DataLoader[tuple[Tensor, Tensor]]


class Part(Dataset[tuple[Tensor, Tensor]]):
    """One part of a split: images (3, size, size), float32 and normalised, with their labels."""

    def __init__(self, images: Images, rows: Integers, transform: v2.Transform) -> None:
        self.pixels = images.pixels[torch.from_numpy(rows)]
        self.labels = torch.from_numpy(images.labels[rows])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.pixels[i]), self.labels[i]


def make_transform(size: int, mean: list[float], std: list[float], augment: bool) -> v2.Transform:
    """Prepare uint8 pixels (C, H, W) for a model of that input size, mean and std.

    The augmentation is light: flips, small turns, shifts and changes of light are as likely in the
    next image of the same scanner, and no finding leaves the view.
    """
    light = [
        v2.RandomHorizontalFlip(),
        v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=2),
        v2.ColorJitter(brightness=0.2, contrast=0.2),
    ]
    return v2.Compose(
        [
            *(light if augment else []),
            v2.Resize((size, size)),
            v2.RGB(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def make_batches(part: Part, batch_size: int, workers: int, shuffle: bool) -> Batches:
    """Batch a part. A last training batch of a single image is left out."""
    # BatchNorm that adapts cannot take statistics from one image of 1 × 1 features.
    lonely = shuffle and len(part) > batch_size and len(part) % batch_size == 1
    return DataLoader(part, batch_size, shuffle=shuffle, num_workers=workers, drop_last=lonely)
