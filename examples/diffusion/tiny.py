"""A latent diffusion pipeline that is built here and pretrained in minutes: the example then runs offline.

It has every part of Stable Diffusion 1.x, a thousandth of the size: an autoencoder, a UNet that attends to
the text, a text encoder, which stays as it was drawn, and a tokenizer. Saved, it is a usual folder of
diffusers.
"""

import json
import re
from collections.abc import Iterable
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import trange
from trainer.errors import TrainerError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import medpeft

from .data import of_classes, pixels, to_model
from .latents import encode
from .pipelines import frozen, open_pipeline
from .settings import Settings
from .training import fit, start_training

TINY_SIZE = 32  # pixels, unless said otherwise
TOKENS, WIDTH, SIDE = 77, 48, 16  # of texts, of their embeddings, of latents
NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}  # of Stable Diffusion 1.x
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
RECORD = "pretrained_on.json"


def tiny_pipeline(settings: Settings, size: int, data: Dataset, classes: list[str]) -> Any:
    """Open the tiny pipeline, or build it, pretrain it and save it.

    The autoencoder sees all images, as that of a real pipeline has seen more than its UNet is asked for; the
    UNet some classes. It is always read from its folder, so that the first run has the same as later ones.

    Raises:
        TrainerError: the folder holds one that was pretrained otherwise, or the size does not fit.
    """
    folder, seed, steps = settings.tiny(size), settings.seed, settings.tiny_steps
    record = {"classes": classes, "size": size, "seed": seed, "images": len(data), "steps": steps}
    if (folder / RECORD).is_file():
        found = json.loads((folder / RECORD).read_text())
        if found != record:
            raise TrainerError(
                f"{folder} was pretrained with {found}, and {record} is asked for. Choose another "
                "--tiny_folder, or delete this one."
            )
        return open_pipeline(str(folder))
    print(f"Pretraining a tiny pipeline on {', '.join(classes)}; it is kept in {folder}", flush=True)
    pipeline = frozen(build_tiny(data["text"], size, seed))
    images = pixels(data["image"], size)
    error = _pretrain_autoencoder(pipeline.vae.requires_grad_(True), images, 2 * steps // 5, seed)
    print(f"  autoencoder: mean absolute error {error / 2:.3f} of the grey scale", flush=True)
    latents = encode(pipeline.vae, of_classes(data, classes), size, settings.latents)
    loss = _pretrain_unet(pipeline, latents, Settings(steps=steps, seed=seed, ema=0.995, lr=2e-3))
    print(f"  UNet: loss {loss:.4f}", flush=True)
    pipeline.save_pretrained(folder)
    # Last of all: without it the folder is not whole.
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return open_pipeline(str(folder))


def build_tiny(texts: Iterable[str], size: int, seed: int) -> StableDiffusionPipeline:
    """Build the pipeline with random weights, for images whose side is 16 times a power of two.

    Raises:
        TrainerError: the size does not fit.
    """
    halvings = (size // SIDE).bit_length() - 1
    if SIDE << max(halvings, 0) != size:
        raise TrainerError(f"--image_size {size} does not fit the tiny pipeline. Use 16, 32, 64 or 128.")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts)
    start, end = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = {"vocab_size": len(tokenizer), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    parts = {
        "vae": _autoencoder(size, halvings),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes, **words, max_position_embeddings=TOKENS)),
        "tokenizer": tokenizer,
        "unet": tiny_unet(),
        "scheduler": DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    }
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **nothing)


def make_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Make CLIP's kind of tokenizer: a token for each word of the texts, letters to spell others with."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL, *letters, *(f"{letter}</w>" for letter in letters)]
    merges: dict[tuple[str, str], str] = {}
    for word in sorted(set(re.findall(r"[a-z]+", " ".join(texts).lower()))):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        start = pieces[0]
        for piece in pieces[1:]:
            merges[start, piece] = start + piece
            start += piece
    places = {token: i for i, token in enumerate(dict.fromkeys([*tokens, *merges.values()]))}
    return CLIPTokenizer(vocab=places, merges=list(merges), model_max_length=TOKENS)


def _autoencoder(size: int, halvings: int) -> AutoencoderKL:
    widths = (16, 32, 32, 32)[: halvings + 1]
    down, up = ("DownEncoderBlock2D",) * len(widths), ("UpDecoderBlock2D",) * len(widths)
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": widths}
    return AutoencoderKL(**blocks, norm_num_groups=8, sample_size=size, mid_block_add_attention=False)


def tiny_unet() -> UNet2DConditionModel:
    """Build the UNet with random weights."""
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": (32, 64)}
    sizes = {"sample_size": SIDE, "cross_attention_dim": WIDTH, "attention_head_dim": 4, "norm_num_groups": 8}
    return UNet2DConditionModel(**blocks, **sizes, layers_per_block=1)


def _pretrain_autoencoder(vae: AutoencoderKL, images: Tensor, steps: int, seed: int) -> float:
    """Teach the autoencoder images (N, 3, H, W), and set its scale so that latents have unit variance.

    The loss is the mean absolute error and a weak pull of the latents to a normal distribution, as in Rombach
    et al. (2022), arXiv 2112.10752, without their other terms. Returns the mean error of the last 50 steps.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.train().parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(steps, 2))
    errors = []
    for _ in trange(steps, desc="autoencoder", leave=False, disable=None):
        some = to_model(images[torch.randint(len(images), (16,), generator=generator)])
        posterior = vae.encode(some).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample(generator)).sample, some)
        optimizer.zero_grad()
        (error + 1e-4 * posterior.kl().mean() / some[0].numel()).backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach()))
    vae.requires_grad_(False).eval()
    rows = torch.randperm(len(images), generator=generator)[:256]
    latents = vae.encode(to_model(images[rows])).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / max(float(latents.std()), 1e-6))
    return mean(errors[-50:])


def _pretrain_unet(pipeline: Any, latents: Dataset, settings: Settings) -> float:
    """Train all of the UNet; give the mean loss of the last hundred steps."""
    fabric = Fabric(accelerator="cpu", devices=1)
    training = start_training(fabric, medpeft.apply(pipeline.unet, "full", head=None), settings)
    fit(fabric, training, pipeline, latents, settings)
    training.average.copy_to(pipeline.unet.parameters())
    medpeft.merge(pipeline.unet)
    return mean(training.losses[-100:])
