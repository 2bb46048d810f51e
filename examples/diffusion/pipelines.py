"""Any Stable Diffusion or SDXL folder of diffusers, and pictures out of it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


def open_pipeline(name: str) -> Any:
    """Open a pipeline, in float32, its parts frozen; the safety checker, which judges photographs, is left out.

    Args:
        name: a folder of diffusers, or a repository on the Hugging Face Hub.

    Raises:
        TrainerError: it cannot be opened, or is of a kind that this example does not train.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, safety_checker=None)
    # Offline, diffusers raises whatever its download library raises.
    except Exception as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainerError(
            f"--pipeline {name} could not be opened: {problem} Give a folder of diffusers or a repository on the Hub, or leave "
            "it out for the tiny pipeline."
        ) from error
    if not isinstance(pipeline, KINDS):
        raise TrainerError(
            f"--pipeline {name} is a {type(pipeline).__name__}; this example trains those of Stable Diffusion 1.x, 2.x and "
            "XL. medpeft.apply adapts the denoisers of others too: see docs/text-to-image.md."
        )
    return quiet(pipeline)


def quiet(pipeline: Any) -> Any:
    """Freeze a pipeline's parts in float32, and turn its progress bars off."""
    pipeline.set_progress_bar_config(disable=True)
    for part in (part for part in pipeline.components.values() if isinstance(part, nn.Module)):
        part.float().requires_grad_(False).eval()
    return pipeline


def noise_schedule(pipeline: Any) -> Any:
    """Give the schedule to train with: a pipeline's own may know only how to generate."""
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
    batch_size: int = 32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Generate one image for each prompt.

    Each image has noise of its own, drawn from `seed` and its place: the same for every adapter, so that pictures of several
    are comparable, and whatever the batch size.

    Args:
        pipeline: as from `open_pipeline`, its UNet adapted or not.
        prompts: N texts.
        seed: of the noise.
        size: the side in pixels.
        steps: of DDIM (Song et al., 2020, arXiv 2010.02502).
        guidance: how far classifier-free guidance goes beyond the text (Ho & Salimans, 2022, arXiv 2207.12598); 1 is none.
        batch_size: images at a time.
        device: where to compute.

    Returns:
        Images (N, 3, size, size) in [0, 1], on the CPU.
    """
    pipeline.to(device)
    images = []
    with _sampling(pipeline):
        for start in range(0, len(prompts), batch_size):
            some = list(prompts[start : start + batch_size])
            # On the CPU, so that every kind of device draws the same.
            noise = [torch.Generator().manual_seed(hash((seed, start + i)) % 2**63) for i in range(len(some))]
            found = pipeline(
                some,
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=noise,
                output_type="pt",
            )
            images.append(found.images.float().cpu())
    return torch.cat(images)


@contextmanager
def _sampling(pipeline: Any) -> Iterator[None]:
    """Evaluation mode, and a schedule of a few steps, for the duration of a `with` block."""
    scheduler, training = pipeline.scheduler, pipeline.unet.training
    pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=False)
    pipeline.unet.eval()
    try:
        yield
    finally:
        pipeline.scheduler = scheduler
        pipeline.unet.train(training)
