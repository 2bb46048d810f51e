"""Frozen features, computed once and kept on disk: a linear probe then trains its head alone."""

import argparse
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .batches import Part, plain_batches
from .errors import TrainerError
from .order import FILLER, IGNORED, Key
from .preprocessing import Preprocessing


class FeaturePart(Dataset[tuple[Tensor, Tensor]]):
    """One part of a split: features (D,) with their labels, asked for as in `Part`."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | Key) -> tuple[Tensor, Tensor]:
        place, seed = (key, 0) if isinstance(key, int) else key
        return self.features[place], self.labels[place] if seed != FILLER else torch.tensor(IGNORED)


def trained_head(model: nn.Module) -> tuple[str, nn.Module]:
    """Give the only layer that trains, and its name.

    Raises:
        TrainerError: more than one layer trains, so the features change as it does.
    """
    names = sorted({name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad})
    if len(names) != 1:
        raise TrainerError(
            f"--cache-features is for methods that train the head alone, and {len(names)} layers train here. "
            "Take --method linear_probe, or leave it out."
        )
    return names[0], model.get_submodule(names[0])


def cached_features(
    fabric: Fabric, args: argparse.Namespace, model: nn.Module, part: Part, preprocessing: Preprocessing
) -> tuple[Tensor, Path, bool]:
    """Give the head's input for every image, from the disk where it was computed before.

    Args:
        fabric: where to compute.
        args: the flags; the features lie in `--cache-features`, in a file named by a digest of weights, pixels,
            preprocessing and precision.
        model: of which only the head trains.
        part: all N images of the data, without augmentation.
        preprocessing: that of the part.

    Returns:
        (N, D) on the CPU; their file; whether it was there.
    """
    name, _ = trained_head(model)
    digest = _digest(model, name, part, f"{type(model).__qualname__} {preprocessing} {args.precision}")
    file = args.cache_features / f"features-{digest}.safetensors"
    if file.exists():
        return load_file(file)["features"], file, True
    args.cache_features.mkdir(parents=True, exist_ok=True)
    features = _compute(fabric, model, part, args.batch_size, args.quiet)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"features": features}, unfinished)
    os.replace(unfinished, file)
    return features, file, False


@torch.no_grad()
def _compute(fabric: Fabric, model: nn.Module, part: Part, batch_size: int, quiet: bool) -> Tensor:
    _, head = trained_head(model)
    model.to(fabric.device).eval()
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    found: list[Tensor] = []
    try:
        for images, _ in tqdm(
            plain_batches(part, batch_size), "features", unit="batch", leave=False, disable=quiet
        ):
            seen.clear()
            with fabric.autocast():
                output = model(images.to(fabric.device))
            if not found:
                _check(model, head, seen, output, fabric)
            found.append(seen[0].float().cpu())
    finally:
        handle.remove()
    return torch.cat(found).contiguous()


def _check(model: nn.Module, head: nn.Module, seen: list[Tensor], output: Tensor, fabric: Fabric) -> None:
    """Raise a TrainerError unless the model is its head after something that does not train."""
    inputs = list(seen)
    with fabric.autocast():
        alone = head(inputs[0]) if len(inputs) == 1 else None
    if alone is None or alone.shape != output.shape or not torch.allclose(alone, output, atol=1e-5):
        raise TrainerError(
            f"{type(model).__name__} computes more than its head after the features, so they cannot stand in for the images. "
            "Leave --cache-features out."
        )


def _digest(model: nn.Module, head: str, part: Part, setting: str) -> str:
    """Name what the features depend on."""
    found = hashlib.sha256(setting.encode())
    for name, tensor in _tensors(model, head, part):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # flatten: a number of batches has no axis, and cannot be seen as bytes.
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _tensors(model: nn.Module, head: str, part: Part) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in model.state_dict().items():
        if not name.startswith(head + "."):
            yield name, tensor
    yield "pixels", part.pixels
