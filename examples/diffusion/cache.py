"""Latents and text embeddings are computed once and kept on disk: training then needs neither autoencoder nor text encoder.

A shard is a safetensors file for some hundred images, named by a digest of all that it was computed from: the weights of both
encoders, the images and their texts. So an interrupted run goes on where it stopped, and no run reads another's.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from medpeft.file import memory, write

from .captions import Captioned, to_model

SHARD = 512


@dataclass
class Encoded:
    """Images as the autoencoder's normal distributions, and their texts, in shards on disk.

    Attributes:
        shards: one file for each `SHARD` images, in order.
        length: the number of images.
        scale: what latents are multiplied with to have unit variance.
        shift: what is subtracted before.
        empty: (T, D), the embedding of no text, for guidance.
    """

    shards: list[Path]
    length: int
    scale: float
    shift: float
    empty: Tensor

    def __len__(self) -> int:
        return self.length

    def batch(self, rows: list[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw latents (B, C, h, w), anew each time, and read the text embeddings (B, T, D), both float32."""
        means, deviations, texts = zip(*(self._read(row) for row in rows), strict=True)
        mean, deviation = torch.stack(means).float(), torch.stack(deviations).float()
        drawn = mean + deviation * torch.randn(mean.shape, generator=generator)
        return (drawn - self.shift) * self.scale, torch.stack(texts).float()

    def _read(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        # Opening maps the file into memory; the system keeps what is read often.
        with safe_open(self.shards[row // SHARD], "pt") as file:
            at = row % SHARD
            text = int(file.get_slice("text_of")[at])
            return file.get_slice("mean")[at], file.get_slice("deviation")[at], file.get_slice("text")[text]


def encode(pipeline: Any, data: Captioned, folder: Path, device: torch.device, batch_size: int = 32) -> Encoded:
    """Encode images and texts with the frozen parts of a pipeline, or find them encoded.

    Args:
        pipeline: a `StableDiffusionPipeline`.
        data: the images and texts.
        folder: where the shards go.
        device: where to compute.
        batch_size: images at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    encoders = (pipeline.vae, pipeline.text_encoder)
    # Sorted: a tokenizer lists its tokens in another order each time.
    vocabulary = sorted(pipeline.tokenizer.get_vocab().items())
    weights = hashlib.sha256(repr([*map(digest_of, encoders), vocabulary]).encode())
    parts = [range(start, min(start + SHARD, len(data))) for start in range(0, len(data), SHARD)]
    shards = [folder / f"{_digest(weights.hexdigest(), data, part)}.safetensors" for part in parts]
    missing = [(path, part) for path, part in zip(shards, parts, strict=True) if not path.exists()]
    for module in encoders:
        module.to(device).eval()
    for path, part in tqdm(missing, desc="encoding", unit="shard", leave=False):
        write(str(path), _encode(pipeline, data, part, device, batch_size), {"format": "pt"})
    config = pipeline.vae.config
    empty = embed(pipeline, [""], device)[0].cpu()
    return Encoded(shards, len(data), float(config.scaling_factor), float(config.shift_factor or 0.0), empty)


@torch.no_grad()
def _encode(pipeline: Any, data: Captioned, part: range, device: torch.device, batch_size: int) -> dict[str, Tensor]:
    means, deviations = [], []
    for rows in _chunks(list(part), batch_size):
        images = to_model(data.pixels(rows)).to(device, pipeline.vae.dtype)
        posterior = pipeline.vae.encode(images).latent_dist
        means.append(posterior.mean.cpu())
        deviations.append(posterior.std.cpu())
    texts = [data.texts[i] for i in part]
    unique = list(dict.fromkeys(texts))
    embedded = torch.cat([embed(pipeline, some, device).cpu() for some in _chunks(unique, batch_size)])
    place = {text: i for i, text in enumerate(unique)}
    text_of = torch.tensor([place[text] for text in texts])
    return {"mean": torch.cat(means), "deviation": torch.cat(deviations), "text": embedded, "text_of": text_of}


@torch.no_grad()
def embed(pipeline: Any, texts: list[str], device: torch.device) -> Tensor:
    """Embed texts as the pipeline does when it generates, (B, T, D); they are cut at the tokenizer's length."""
    tokens = pipeline.tokenizer(
        texts, padding="max_length", max_length=pipeline.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    found: Tensor = pipeline.text_encoder(tokens.input_ids.to(device))[0]
    return found


def digest_of(module: nn.Module) -> str:
    """Name a module by all of its weights."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(memory(tensor.detach().cpu().contiguous()))
    return found.hexdigest()


def _digest(weights: str, data: Captioned, part: range) -> str:
    if isinstance(data.images, Tensor):
        images: list[Any] = [hashlib.sha256(memory(data.images[part.start : part.stop].contiguous())).hexdigest()]
    else:
        # Reading a few hundred thousand files at each start would take longer than an epoch.
        found = [(data.images[i], data.images[i].stat()) for i in part]
        images = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in found]
    said = [weights, data.size, images, [data.texts[i] for i in part]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
