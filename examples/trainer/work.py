"""What one run works with: images, a split of them, an adapted model, and what is known before training."""

import os
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
from torch import nn

import medpeft

from .data.batches import FeaturePart, Part, Preprocessing
from .data.features import cached_parts
from .data.joint import masked_parts
from .data.rows import Images
from .data.sources import read_data
from .data.splits import divided_groups, split
from .data.starts import batches, looks_at_images
from .files.images import Integers
from .networks.model import adapt, base_model, input_statistics
from .networks.origin import weights_of
from .results.cost import bytes_kept_for_backward
from .settings import Settings
from .tasks import TASKS, Task


@dataclass
class Work:
    """The objects of one run.

    Attributes:
        settings: checked.
        task: what is asked of the images.
        images: the data.
        found: where in `images` those of each part are, by "train", "val" and "test".
        model: adapted.
        preprocessing: from a file to the model's input.
    """

    settings: Settings
    task: Task
    images: Images
    found: dict[str, Integers]
    model: nn.Module
    preprocessing: Preprocessing


def prepare(settings: Settings) -> Work:
    """Read and split the images, and adapt the model that fits them."""
    images = read_data(settings)
    found = split(images, settings)
    task = TASKS[settings.task](images.classes).informed(images.details)
    task = task.prepared(images.targets[found["train"]])
    lightning.seed_everything(settings.seed, verbose=False)
    stored = tuple(images.pixels.shape[2:])
    model, filled = base_model(settings, task.outputs, len(stored))
    mean, std = input_statistics(model)
    preprocessing = Preprocessing(stored, settings.image_size, mean, std)
    looked_at = None
    if looks_at_images(settings.option):
        looked_at = batches(images, found["train"], preprocessing, settings)
    model = adapt(settings, model, filled, looked_at)
    return Work(settings, task, images, found, model, preprocessing)


def describe_work(work: Work, trainer: lightning.Trainer) -> dict[str, Any]:
    """Give what is known before the training."""
    settings = work.settings
    at_once = settings.batch_size // (settings.accumulate * trainer.world_size)
    return {
        "settings": settings.plain(),
        "digest": settings.digest(),
        "classes": work.images.classes,
        "images": {part: work.task.count(work.images.targets[rows]) for part, rows in work.found.items()},
        "parts": sizes_of_parts(work.images, work.found),
        "divided_groups": divided_groups(work.images, work.found),
        "notes": work.images.notes,
        "broken_images": work.images.broken,
        "input": work.preprocessing.to_metadata(),
        "weights": weights_of(settings, work.model),
        "parameters": medpeft.report(work.model).total,
        "trainable": sum(p.numel() for p in work.model.parameters() if p.requires_grad),
        "saved_bytes": bytes_kept_for_backward(
            work.model, at_once, trained_shape(settings, work.preprocessing)
        ),
    }


def sizes_of_parts(images: Images, found: dict[str, Integers]) -> dict[str, dict[str, int]]:
    """Count the images of each part, and the groups (patients, copies) that they make."""
    sizes = {}
    for part, rows in found.items():
        sizes[part] = {"images": len(rows), "groups": len(np.unique(images.groups[rows]))}
    return sizes


def trained_shape(settings: Settings, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Give the shape of what the model is trained on: an image, or a crop of it."""
    side = settings.patch_size or preprocessing.image_size
    return (side,) * len(preprocessing.stored)


def parts_of(work: Work) -> tuple[nn.Module, dict[str, Part] | dict[str, FeaturePart]]:
    """Give what is trained and what it is fed: the model and images, or its rest and their features."""
    settings, images, found = work.settings, work.images, work.found
    if settings.task == "segment":
        return work.model, masked_parts(images, found, work.preprocessing, settings)
    if settings.cache_features is None:
        parts = {}
        for part, rows in found.items():
            augment = str(settings.augment) if part == "train" else "none"
            parts[part] = Part(images, rows, work.preprocessing, augment, settings.seed)
        return work.model, parts
    rest, cached, notes = cached_parts(settings, work.model, images, found, work.preprocessing)
    for note in notes:
        say(settings, note)
    return rest, cached


def say(settings: Settings, text: str) -> None:
    """Print on the first process, at once, also into a pipe."""
    if not settings.quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)
