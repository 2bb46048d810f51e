"""Frozen features, computed once and kept on disk: a linear probe then trains its head alone."""

import hashlib
import os
from pathlib import Path

import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .data import Part
from .errors import TrainerError
from .settings import Settings


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


def cached_features(settings: Settings, model: nn.Module, part: Part) -> tuple[Tensor, Path, bool]:
    """Give the head's input for every image, from the disk where it was computed before.

    Args:
        settings: the features lie in `cache_features`, in a file named by a digest of weights, pixels,
            preprocessing and precision.
        model: of which only the head trains.
        part: all N images of the data, without augmentation.

    Returns:
        (N, D) on the CPU; their file; whether it was there.
    """
    folder = Path(str(settings.cache_features))
    name, _ = trained_head(model)
    digest = _digest(
        model, name, part, f"{type(model).__qualname__} {part.preprocessing} {settings.precision}"
    )
    file = folder / f"features-{digest}.safetensors"
    if file.exists():
        return load_file(file)["features"], file, True
    folder.mkdir(parents=True, exist_ok=True)
    features = _compute(settings, model, part)
    unfinished = file.with_suffix(f".{os.getpid()}")
    save_file({"features": features}, unfinished)
    os.replace(unfinished, file)
    return features, file, False


@torch.no_grad()
def _compute(settings: Settings, model: nn.Module, part: Part) -> Tensor:
    fabric = Fabric(accelerator=settings.accelerator, devices=1, precision=settings.precision)
    _, head = trained_head(model)
    model.to(fabric.device).eval()
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    found: list[Tensor] = []
    try:
        for images, _ in DataLoader(part, settings.batch_size):
            seen.clear()
            with fabric.autocast():
                output = model(images.to(fabric.device))
            if not found:
                _check(model, head, list(seen), output, fabric)
            found.append(seen[0].float().cpu())
    finally:
        handle.remove()
    return torch.cat(found).contiguous()


def _check(model: nn.Module, head: nn.Module, inputs: list[Tensor], output: Tensor, fabric: Fabric) -> None:
    """Raise a TrainerError unless the model is its head after something that does not train."""
    with fabric.autocast():
        alone = head(inputs[0]) if len(inputs) == 1 else None
    if alone is None or alone.shape != output.shape or not torch.allclose(alone, output, atol=1e-5):
        raise TrainerError(
            f"{type(model).__name__} computes more than its head after the features, so they cannot stand in "
            "for the images. Leave --cache-features out."
        )


def _digest(model: nn.Module, head: str, part: Part, setting: str) -> str:
    """Name what the features depend on."""
    found = hashlib.sha256(setting.encode())
    frozen = {key: value for key, value in model.state_dict().items() if not key.startswith(head + ".")}
    for name, tensor in [*frozen.items(), ("pixels", part.pixels)]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # flatten: a number of batches has no axis, and cannot be seen as bytes.
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
