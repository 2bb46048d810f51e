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

from medpeft.checkpoint.file import memory, write

from .captions import Captioned, to_model

SHARD = 512


# What a text gives the UNet: "text", (B, T, D), and with SDXL "pooled", (B, P).
Condition = dict[str, Tensor]


@dataclass
class Encoded:
    """Images as the autoencoder's normal distributions, and their texts, in shards on disk.

    Attributes:
        shards: one file for each `SHARD` images, in order.
        length: the number of images.
        size: their side in pixels.
        scale: what latents are multiplied with to have unit variance.
        shift: what is subtracted before.
        empty: the condition of no text, for guidance.
    """

    shards: list[Path]
    length: int
    size: int
    scale: float
    shift: float
    empty: Condition

    def __len__(self) -> int:
        return self.length

    def batch(self, rows: list[int], generator: torch.Generator) -> tuple[Tensor, Condition]:
        """Draw latents (B, C, h, w), anew each time, and read the conditions of their texts, all float32."""
        found = [self._read(row) for row in rows]
        joined = {name: torch.stack([one[name] for one in found]).float() for name in found[0]}
        mean, deviation = joined.pop("mean"), joined.pop("deviation")
        drawn = mean + deviation * torch.randn(mean.shape, generator=generator)
        return (drawn - self.shift) * self.scale, joined

    def _read(self, row: int) -> dict[str, Tensor]:
        # Opening maps the file into memory; the system keeps what is read often.
        with safe_open(self.shards[row // SHARD], "pt") as file:
            at = row % SHARD
            text = int(file.get_slice("text_of")[at])
            image = {name: file.get_slice(name)[at] for name in ("mean", "deviation")}
            return image | {name: file.get_slice(name)[text] for name in self.empty}


def encode(
    pipeline: Any, data: Captioned, folder: Path, device: torch.device, batch_size: int = 32
) -> Encoded:
    """Encode images and texts with the frozen parts of a pipeline, or find them encoded.

    Args:
        pipeline: a `StableDiffusionPipeline` or a `StableDiffusionXLPipeline`.
        data: the images and texts.
        folder: where the shards go.
        device: where to compute.
        batch_size: images at a time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    frozen = _encoders(pipeline)
    # Sorted: a tokenizer lists its tokens in another order each time.
    words = [sorted(part.get_vocab().items()) for part in _parts(pipeline, "tokenizer")]
    weights = hashlib.sha256(repr([*map(digest_of, frozen), words]).encode())
    parts = [range(start, min(start + SHARD, len(data))) for start in range(0, len(data), SHARD)]
    shards = [folder / f"{_digest(weights.hexdigest(), data, part)}.safetensors" for part in parts]
    missing = [(path, part) for path, part in zip(shards, parts, strict=True) if not path.exists()]
    for module in frozen:
        module.to(device).eval()
    for path, part in tqdm(missing, desc="encoding", unit="shard", leave=False):
        write(str(path), _encode(pipeline, data, part, device, batch_size), {"format": "pt"})
    config = pipeline.vae.config
    empty = {name: tensor[0].cpu() for name, tensor in embed(pipeline, [""], device)[1].items()}
    return Encoded(
        shards, len(data), data.size, float(config.scaling_factor), float(config.shift_factor or 0.0), empty
    )


def _encoders(pipeline: Any) -> list[Any]:
    return [pipeline.vae, *_parts(pipeline, "text_encoder")]


def _parts(pipeline: Any, kind: str) -> list[Any]:
    """The text encoders or tokenizers: SDXL has two."""
    return [
        part
        for name, part in sorted(pipeline.components.items())
        if name.startswith(kind) and part is not None
    ]


@torch.no_grad()
def _encode(
    pipeline: Any, data: Captioned, part: range, device: torch.device, batch_size: int
) -> dict[str, Tensor]:
    means, deviations = [], []
    for rows in _chunks(list(part), batch_size):
        images = to_model(data.pixels(rows)).to(device, pipeline.vae.dtype)
        posterior = pipeline.vae.encode(images).latent_dist
        means.append(posterior.mean.cpu())
        deviations.append(posterior.std.cpu())
    texts = [data.texts[i] for i in part]
    unique = list(dict.fromkeys(texts))
    embedded = [embed(pipeline, some, device)[0] for some in _chunks(unique, batch_size)]
    condition = {name: torch.cat([one[name].cpu() for one in embedded]) for name in embedded[0]}
    place = {text: i for i, text in enumerate(unique)}
    text_of = torch.tensor([place[text] for text in texts])
    return {"mean": torch.cat(means), "deviation": torch.cat(deviations), "text_of": text_of, **condition}


@torch.no_grad()
def embed(pipeline: Any, texts: list[str], device: torch.device) -> tuple[Condition, Condition]:
    """Embed texts as the pipeline does when it generates, and no text as often; texts are cut at the tokenizer's length."""
    found = pipeline.encode_prompt(
        prompt=texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    if len(found) == 2:
        return {"text": found[0]}, {"text": found[1]}
    return {"text": found[0], "pooled": found[2]}, {"text": found[1], "pooled": found[3]}


def digest_of(module: nn.Module) -> str:
    """Name a module by all of its weights."""
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        found.update(memory(tensor.detach().cpu().contiguous()))
    return found.hexdigest()


def _digest(weights: str, data: Captioned, part: range) -> str:
    if isinstance(data.images, Tensor):
        images: list[Any] = [
            hashlib.sha256(memory(data.images[part.start : part.stop].contiguous())).hexdigest()
        ]
    else:
        # Reading a few hundred thousand files at each start would take longer than an epoch.
        found = [(data.images[i], data.images[i].stat()) for i in part]
        images = [[str(path.resolve()), stat.st_size, stat.st_mtime_ns] for path, stat in found]
    said = [weights, data.size, images, [data.texts[i] for i in part]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    return (items[i : i + size] for i in range(0, len(items), size))
