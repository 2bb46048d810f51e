"""Latents are computed once and kept on disk, so that training needs no autoencoder.

They are Arrow files of `datasets`, each for some hundred images, named by a digest of autoencoder and images.
So an interrupted run goes on, and none reads another's.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Features, Image, List, Value, concatenate_datasets
from torch import Tensor

from medpeft.checkpoint.file import memory

from .data import pixels, to_model

SHARD = 512


@torch.no_grad()
def encode(vae: Any, data: Dataset, size: int, folder: Path) -> Dataset:
    """Add to images, of a size in pixels, mean and deviation of their latents, or find them in the folder.

    Latents (C, h, w) are flat: `datasets` reads lists of one length fastest.
    """

    def see(columns: dict[str, Any]) -> dict[str, Any]:
        posterior = vae.encode(to_model(pixels(columns["image"], size)).to(vae.device, vae.dtype)).latent_dist
        latents = {"mean": posterior.mean, "deviation": posterior.std}
        return {name: values.float().cpu().flatten(1).numpy() for name, values in latents.items()}

    folder.mkdir(parents=True, exist_ok=True)
    halvings = len(vae.config.block_out_channels) - 1
    numbers = List(Value("float32"), length=vae.config.latent_channels * (size >> halvings) ** 2)
    features = Features({"text": Value("string"), "mean": numbers, "deviation": numbers})
    weights, parts = hashlib.sha256(), []
    for name, tensor in vae.state_dict().items():
        weights.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + memory(tensor.cpu().contiguous())
        )
    for start in range(0, len(data), SHARD):
        part = data.select(range(start, min(start + SHARD, len(data)))).select_columns(["image", "text"])
        digest = hashlib.sha256(f"{weights.hexdigest()} {size} {_content(part)}".encode()).hexdigest()
        file = {"new_fingerprint": digest, "cache_file_name": str(folder / f"{digest}.arrow")}
        options = {"batched": True, "batch_size": 32, "remove_columns": "image", "features": features}
        parts.append(part.map(see, desc="encoding", **options, **file))
    return concatenate_datasets(parts).with_format("torch")


def _content(part: Dataset) -> list[Any]:
    """Name images by their bytes, files by path, size and time: reading all of them would take too long."""
    found: list[Any] = list(part["text"])
    for image in part.cast_column("image", Image(decode=False))["image"]:
        if image["bytes"]:
            found.append(image["bytes"])
        else:
            stat = Path(image["path"]).stat()
            found.append((Path(image["path"]).resolve(), stat.st_size, stat.st_mtime_ns))
    return found


def draw(rows: dict[str, Any], vae: Any, generator: torch.Generator) -> Tensor:
    """Draw latents (B, C, h, w) of unit variance from the normal distributions of some images."""
    drawn: Tensor = rows["mean"] + rows["deviation"] * torch.randn(rows["mean"].shape, generator=generator)
    side = int((drawn.shape[1] / vae.config.latent_channels) ** 0.5)
    scaled = (drawn - (vae.config.shift_factor or 0.0)) * float(vae.config.scaling_factor)
    return scaled.view(len(drawn), -1, side, side)  # (B, C·h·w) → (B, C, h, w)
