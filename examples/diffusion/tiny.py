"""A latent diffusion pipeline that is built here and pretrained in minutes, so that the example runs offline on a CPU.

It has every part of Stable Diffusion 1.x, a thousandth of the size: an autoencoder, a UNet that attends to the text, a text
encoder, which stays as it was drawn, and a tokenizer. It is an ordinary folder of diffusers when it is saved.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import trange
from trainer.errors import TrainerError
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .captions import Captioned, to_model

TINY_SIZE = 32  # pixels, unless said otherwise
TOKENS, WIDTH, LATENT_SIDE = 77, 48, 16
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
RECORD = "pretrained_on.json"


def build_tiny(texts: Iterable[str], size: int, seed: int) -> StableDiffusionPipeline:
    """Build the pipeline with random weights.

    Args:
        texts: their words become tokens; others are spelled.
        size: the side of the images in pixels: 16 times a power of two.
        seed: of the weights.

    Raises:
        TrainerError: the size does not fit.
    """
    halvings = (size // LATENT_SIDE).bit_length() - 1
    if LATENT_SIDE << max(halvings, 0) != size:
        raise TrainerError(f"--image-size {size} does not fit the tiny pipeline. Use 16, 32, 64 or 128.")
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(texts)
    return StableDiffusionPipeline(
        vae=_autoencoder(size, halvings),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=_unet(),
        scheduler=_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to("cpu")


def make_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Make CLIP's kind of tokenizer, byte-pair encoding, whose merges spell each word of the texts from left to right."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*SPECIAL, *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in sorted({word for text in texts for word in re.findall(r"[a-z]+", text.lower())}):
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        merges += [("".join(pieces[:i]), pieces[i]) for i in range(1, len(pieces))]
    merges = list(dict.fromkeys(merges))
    tokens += [left + right for left, right in merges]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        model_max_length=TOKENS,
    )


def _autoencoder(size: int, halvings: int) -> AutoencoderKL:
    widths = (16, 32, 32, 32)[: halvings + 1]
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIDE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    start, end = tokenizer.convert_tokens_to_ids(list(SPECIAL))
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config).eval()


def _schedule() -> DDIMScheduler:
    """The noise of Stable Diffusion 1.x."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pretrain_autoencoder(
    vae: AutoencoderKL, data: Captioned, steps: int, seed: int, batch_size: int = 16
) -> float:
    """Teach the autoencoder the images, and set its scale so that latents have unit variance; give its last mean error.

    The loss is the mean absolute error and a weak pull of the latents to a normal distribution, as in Rombach et al. (2022),
    arXiv 2112.10752, without their perceptual and adversarial terms.

    Returns:
        The mean absolute error of the last 50 steps, in units in which images reach from −1 to 1.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.train().parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=max(steps, 2))
    errors = []
    for _ in trange(steps, desc="autoencoder", unit="step", leave=False):
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        images = to_model(data.pixels(rows.tolist()))
        posterior = vae.encode(images).latent_dist
        error = F.l1_loss(vae.decode(posterior.sample(generator)).sample, images)
        optimizer.zero_grad()
        (error + 1e-4 * posterior.kl().mean() / images[0].numel()).backward()
        optimizer.step()
        schedule.step()
        errors.append(float(error.detach()))
    vae.eval()
    vae.register_to_config(scaling_factor=_scale(vae, data, generator))
    last = errors[-50:]
    return sum(last) / max(len(last), 1)


@torch.no_grad()
def _scale(vae: AutoencoderKL, data: Captioned, generator: torch.Generator) -> float:
    rows = torch.randperm(len(data), generator=generator)[:256].tolist()
    latents: Tensor = vae.encode(to_model(data.pixels(rows))).latent_dist.mean
    return 1 / max(float(latents.std()), 1e-6)


def save_tiny(pipeline: StableDiffusionPipeline, folder: Path, record: dict[str, Any]) -> None:
    """Save the pipeline, and what it was pretrained on beside it, last of all: without that it is not whole."""
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def saved_tiny(folder: Path, record: dict[str, Any]) -> bool:
    """Whether the folder holds a whole pipeline that was pretrained in this way.

    Raises:
        TrainerError: it was pretrained in another.
    """
    if not (folder / RECORD).is_file():
        return False
    found = json.loads((folder / RECORD).read_text())
    apart = [key for key, value in record.items() if found.get(key) != value]
    if apart:
        raise TrainerError(
            f"{folder} was pretrained with {apart[0]} {found.get(apart[0])!r}, and {record[apart[0]]!r} is asked for. "
            "Choose another --tiny-folder, or delete this one."
        )
    return True
