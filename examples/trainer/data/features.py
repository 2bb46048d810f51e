"""Features kept on disk: what the model computes before its first trainable tensor, once for every epoch."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

import medpeft
from medpeft.checkpoint.file import memory
from medpeft.features.route import find_route

from ..errors import TrainerError
from ..files.images import Integers
from ..settings import Settings
from .batches import FeaturePart, Part, Preprocessing
from .rows import Images

Kept = tuple[nn.Module, dict[str, FeaturePart], list[str]]


def check_prefix(settings: Settings, model: nn.Module) -> None:
    """Find the place at which features are taken, without memory and for images in two dimensions.

    Args:
        settings: of the run.
        model: adapted, on the meta device.

    Raises:
        TrainerError: there is none; the message says what is in the way.
    """
    images = torch.empty(2, 3, settings.image_size, settings.image_size, device="meta")
    try:
        find_route(model, images, None)
    except medpeft.MedpeftError as error:
        raise TrainerError(f"--cache-features: {error}") from error


def cached_parts(
    settings: Settings,
    model: nn.Module,
    images: Images,
    found: Mapping[str, Integers],
    preprocessing: Preprocessing,
) -> Kept:
    """Compute the features of all images, or read them from the disk where they were computed before.

    One file has those of every image as it is, for any split and seed. With several views another one has
    those of the training images, augmented as on images.

    Args:
        settings: the files lie in `cache_features`.
        model: adapted.
        images: the data.
        found: the positions of the images in each part.
        preprocessing: of an image before the model.

    Returns:
        The model from its features on, the parts with their features, and what is worth saying.

    Raises:
        TrainerError: something flows around the features, or changes before them.
        medpeft.MedpeftError: a file cannot be written, or was altered.
    """
    fabric = Fabric(accelerator=settings.accelerator, devices=1, precision=settings.precision)
    model.to(fabric.device)
    everything = Part(images, np.arange(len(images)), preprocessing)
    with fabric.autocast():
        split = _prefix(model, everything, fabric.device)
        # Hashed once: these tensors may be a gigabyte.
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        base = _digest({name: tensors[name] for name in split.route.tensors})
        features, note = _kept(settings, split, base, everything, 1)
        notes = [str(split), note]
        parts = {}
        for name, rows in found.items():
            parts[name] = FeaturePart(features, rows, Part(images, rows, preprocessing))
        views = settings.views or 1
        if views > 1:
            part = Part(images, found["train"], preprocessing, str(settings.augment), settings.seed)
            features, note = _kept(settings, split, base, part, views)
            parts["train"] = FeaturePart(features, np.arange(len(part)), part, views)
            notes.append(note)
    return split.rest, parts, notes


def _prefix(model: nn.Module, part: Part, device: torch.device) -> medpeft.Prefix:
    """Split the model, and prove it on the first images."""
    first = [part[place][0] for place in range(min(4, len(part)))]
    try:
        return medpeft.prefix(model, torch.stack(first).to(device))
    except medpeft.MedpeftError as error:
        raise TrainerError(f"--cache-features: {error}") from error


class Views(Sequence[Tensor]):
    """The views of the images of a part, those of one image after another."""

    def __init__(self, part: Part, views: int) -> None:
        self.part, self.views = part, views

    def __len__(self) -> int:
        return len(self.part) * self.views

    def __getitem__(self, row: int) -> Tensor:  # type: ignore[override]  # no slices are asked for
        return self.part[divmod(row, self.views)][0]


def _kept(
    settings: Settings, split: medpeft.Prefix, base: str, part: Part, views: int
) -> tuple[medpeft.FeatureFile, str]:
    """Give the features of all views of a part's images, and say where they are."""
    data = _digest({"pixels": part.pixels})
    made = f"{part.preprocessing} {settings.precision}"
    if views > 1:
        made += f" --augment {settings.augment} --views {views} --seed {settings.seed}"
    kind = getattr(torch, settings.feature_dtype or str(split.dtype).removeprefix("torch."))
    network = f"{settings.model} {settings.model_option}"
    words = " ".join([network, base, split.place, data, made, str(kind)])
    folder = Path(str(settings.cache_features))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.features"
    did = "Took" if path.exists() else "Computed"
    inputs = Views(part, views)
    split.store(path, inputs, data=data, preprocessing=made, dtype=kind, batch_size=settings.batch_size)
    # Opened anew: another run may have put its own file there meanwhile.
    file = split.open(path, data=data, preprocessing=made)
    several = f" in {views} views" if views > 1 else ""
    size = f"{path.stat().st_size / 2**20:,.1f} MiB"
    return file, f"{did} the features of {len(part)} images{several}: {path}, {size}"


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Name the values of tensors."""
    hashed = hashlib.sha256()
    for name, tensor in tensors.items():
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(memory(tensor.detach().cpu().contiguous()))
    return hashed.hexdigest()
