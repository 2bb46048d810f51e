"""Any Stable Diffusion or SDXL folder of diffusers, and pictures out of it."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from torch import Tensor, nn
from trainer.errors import TrainerError

KINDS = (StableDiffusionPipeline, StableDiffusionXLPipeline)
BATCH = 32


def open_pipeline(name: str) -> Any:
    """Open a pipeline, frozen, in float32, without its safety checker, which judges photographs.

    Raises:
        TrainerError: it cannot be opened, or is of a kind that this example does not train.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, safety_checker=None)
    # Offline, diffusers raises whatever its download library raises.
    except Exception as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainerError(
            f"--pipeline {name} could not be opened: {problem} Give a folder of diffusers or a repository on "
            "the Hub, or leave it out for the tiny pipeline."
        ) from error
    if not isinstance(pipeline, KINDS):
        raise TrainerError(
            f"--pipeline {name} is a {type(pipeline).__name__}; this example trains those of Stable "
            "Diffusion 1.x, 2.x and XL. medpeft.apply adapts others too: see docs/text-to-image.md."
        )
    return frozen(pipeline)


def frozen(pipeline: Any) -> Any:
    """Freeze a pipeline's parts in float32, let it generate by DDIM, and turn its progress bars off."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.float().requires_grad_(False).eval()
    return pipeline


def noise_schedule(pipeline: Any) -> Any:
    """Give the schedule to train with."""
    return DDPMScheduler.from_config(pipeline.scheduler.config)


def image_size(pipeline: Any) -> int:
    """Give the side in pixels of the images that the pipeline was trained for."""
    return int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)


@torch.no_grad()
def generate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    seed: int,
    size: int,
    steps: int = 25,
    guidance: float = 2.0,
) -> Tensor:
    """Generate an image for each of N prompts: (N, 3, size, size) in [0, 1], on the CPU.

    Each has noise of its own, drawn from `seed` and its place: the same for every adapter, so that pictures
    of several are comparable. The steps are those of DDIM (Song et al., 2020, arXiv 2010.02502);
    classifier-free guidance (Ho & Salimans, 2022, arXiv 2207.12598) goes beyond the text, 1 is none.
    """
    pipeline.unet.eval()
    images = []
    for start in range(0, len(prompts), BATCH):
        some = list(prompts[start : start + BATCH])
        # On the CPU, so that every kind of device draws the same.
        noise = [torch.Generator().manual_seed(hash((seed, start + i)) % 2**63) for i in range(len(some))]
        sizes = {"height": size, "width": size, "num_inference_steps": steps}
        found = pipeline(some, guidance_scale=guidance, generator=noise, output_type="pt", **sizes)
        images.append(found.images.float().cpu())
    return torch.cat(images)
