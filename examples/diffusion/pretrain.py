"""The tiny pipeline is pretrained on some classes once, and kept for every method that is tried on it."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

import medpeft

from .cache import encode
from .captions import Captioned
from .loop import Recipe, fit, start_training
from .pipelines import noise_schedule, open_pipeline, quiet
from .tiny import build_tiny, pretrain_autoencoder, save_tiny, saved_tiny


def tiny_pipeline(
    data: Captioned, classes: list[str], folder: Path, *, cache: Path, steps: tuple[int, int], seed: int
) -> Any:
    """Open the tiny pipeline, or build it, pretrain it and save it.

    Args:
        data: images of all classes, none of them held out.
        classes: those that the UNet is trained on.
        folder: where the pipeline is kept.
        cache: where latents go.
        steps: of the autoencoder and of the UNet.
        seed: of all that is drawn.

    Returns:
        A `StableDiffusionPipeline`, read from the folder, so that the first run has the same as the later ones.

    Raises:
        TrainerError: the folder holds one that was pretrained otherwise, or the size does not fit.
    """
    record = {"classes": classes, "size": data.size, "seed": seed, "images": len(data), "steps": list(steps)}
    if saved_tiny(folder, record):
        return open_pipeline(str(folder))
    print(f"Pretraining a tiny pipeline on {', '.join(classes)}; it is kept in {folder}", flush=True)
    pipeline = build_tiny(data.texts, data.size, seed)
    # The autoencoder sees every class, as that of a real pipeline has seen more than its UNet is asked for.
    error = pretrain_autoencoder(pipeline.vae, data, steps[0], seed)
    print(f"  autoencoder: mean absolute error {error / 2:.3f} of the grey scale", flush=True)
    loss = _pretrain_unet(quiet(pipeline), data.of(classes), cache, steps[1], seed)
    print(f"  UNet: loss {loss:.4f}", flush=True)
    save_tiny(pipeline, folder, record)
    return open_pipeline(str(folder))


def _pretrain_unet(pipeline: Any, data: Captioned, cache: Path, steps: int, seed: int) -> float:
    """Train all of the UNet; give the mean loss of the last hundred steps."""
    fabric = Fabric(accelerator="cpu", devices=1)
    encoded = encode(pipeline, data, cache, torch.device("cpu"))
    medpeft.apply(pipeline.unet, "full", head=None)
    recipe = Recipe(steps, seed=seed)
    training = start_training(fabric, pipeline.unet, recipe, lr=2e-3, weight_decay=0.01)
    fit(fabric, training, noise_schedule(pipeline), encoded, recipe)
    training.average.put(training.unet)
    medpeft.merge(pipeline.unet)
    last = training.losses[-100:]
    return sum(last) / len(last)
