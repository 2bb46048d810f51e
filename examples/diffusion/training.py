"""The training loop: the UNet guesses the noise in latents; all that a step draws follows from its number.

So a run that was interrupted repeats, after its last checkpoint, what it would have done.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel, compute_snr
from lightning.fabric import Fabric
from torch import Tensor, nn
from tqdm import tqdm
from trainer.errors import TrainerError

import medpeft

from .latents import draw
from .pipelines import noise_schedule
from .settings import Settings


@dataclass
class Training:
    """A UNet on its way: all that a checkpoint has to hold.

    Attributes:
        unet: the adapted model, as Fabric set it up.
        optimizer: over its trainable parameters.
        schedule: of its rate, stepped after every step.
        average: of the trainable parameters alone, moving; it is what is saved in the end.
        losses: one of each step, weighted.
    """

    unet: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: EMAModel
    losses: list[float] = field(default_factory=list)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the UNet for the duration of a `with` block."""
        self.average.store(trainable(self.unet))
        self.average.copy_to(trainable(self.unet))
        try:
            yield
        finally:
            self.average.restore(trainable(self.unet))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """List the parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def start_training(fabric: Fabric, unet: nn.Module, settings: Settings) -> Training:
    """Put an adapted UNet at the beginning."""
    groups = medpeft.parameter_groups(unet, lr=settings.rate, weight_decay=settings.weight_decay)
    optimizer = torch.optim.AdamW(groups)
    schedule = get_cosine_schedule_with_warmup(optimizer, settings.steps // 20, settings.steps)
    on_device, stepped = fabric.setup(unet, optimizer)
    return Training(on_device, stepped, schedule, EMAModel(trainable(on_device), decay=settings.ema))


def fit(
    fabric: Fabric,
    training: Training,
    pipeline: Any,
    data: Dataset,
    settings: Settings,
    after_step: Callable[[Training, int], None] = lambda training, step: None,
) -> None:
    """Take the steps that are left, of `settings.steps`.

    Raises:
        TrainerError: the loss is no longer a number.
    """
    steps, noise = range(len(training.losses), settings.steps), noise_schedule(pipeline)
    # None: where the output is no terminal.
    for step in tqdm(steps, desc="training", leave=False, disable=fabric.global_rank > 0 or None):
        training.unet.train()
        loss = take_step(fabric, training, pipeline, noise, data, settings)
        if not math.isfinite(loss):
            raise TrainerError(f"The loss became {loss} in step {step + 1}. Lower --lr, or check the images.")
        training.losses.append(loss)
        after_step(training, step + 1)


def take_step(
    fabric: Fabric, training: Training, pipeline: Any, noise: Any, data: Dataset, settings: Settings
) -> float:
    """Take one step; give its loss, the mean over all devices."""
    step, rank, batch = len(training.losses), fabric.global_rank, settings.batch_size
    # On the CPU, so that every kind of device draws the same.
    generator = torch.Generator().manual_seed(hash((settings.seed, step, rank)) % 2**63)
    first = (step * fabric.world_size + rank) * batch
    rows = data[rows_of(len(data), settings.seed, range(first, first + batch))]
    latents = draw(rows, pipeline.vae, generator)
    dropped = torch.rand(batch, generator=generator) < settings.drop_text
    times = torch.randint(noise.config.num_train_timesteps, (batch,), generator=generator)
    added = torch.randn(latents.shape, generator=generator)
    latents, times, added = fabric.to_device((latents, times, added))
    size = latents.shape[-1] * pipeline.vae_scale_factor
    inputs = unet_inputs(pipeline, list(rows["text"]), dropped, size, fabric.device)
    loss = denoising_loss(training.unet, noise, latents, inputs, times, added, settings.snr_gamma)
    training.optimizer.zero_grad()
    fabric.backward(loss)
    fabric.clip_gradients(training.unet, training.optimizer, max_norm=1.0, error_if_nonfinite=False)
    training.optimizer.step()
    training.schedule.step()
    training.average.step(trainable(training.unet))
    everywhere: Any = fabric.all_reduce(loss.detach(), reduce_op="mean")
    return float(everywhere)


def rows_of(length: int, seed: int, places: range) -> list[int]:
    """Say which images come at some places: every image once, in a new order, before any comes again."""
    return [_order(length, seed, place // length)[place % length] for place in places]


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order: list[int] = torch.randperm(length, generator=generator).tolist()
    return order


@torch.no_grad()
def unet_inputs(
    pipeline: Any, texts: list[str], dropped: Tensor, size: int, device: torch.device
) -> dict[str, Any]:
    """Embed texts, none where they are dropped, as the pipeline does when it generates, for its UNet.

    SDXL is told the size, what was cropped off and the size wanted (Podell et al., 2023, arXiv 2307.01952).
    """
    found = pipeline.encode_prompt(
        texts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    for given, empty in zip(found[::2], found[1::2], strict=True):
        given[dropped.to(device)] = empty[dropped.to(device)]
    inputs: dict[str, Any] = {"encoder_hidden_states": found[0]}
    if len(found) == 4:
        sizes = found[2].new_tensor([size, size, 0, 0, size, size]).expand(len(texts), 6)
        inputs["added_cond_kwargs"] = {"text_embeds": found[2], "time_ids": sizes}
    return inputs


def denoising_loss(
    unet: Callable[..., Any],
    noise: Any,
    latents: Tensor,
    inputs: dict[str, Any],
    times: Tensor,
    added: Tensor,
    gamma: float,
) -> Tensor:
    """Mean squared error of the UNet's guess at the noise added, or the velocity where the schedule says so.

    Latents are (B, C, h, w), times (B,). The weight of a time is min(SNR, γ)/SNR, or min(SNR, γ)/(SNR + 1)
    for the velocity; γ = 0 is none. Hang et al., "Efficient Diffusion Training via Min-SNR Weighting
    Strategy" (2023), arXiv 2303.09556, section 3.4.
    """
    guess = unet(noise.add_noise(latents, added, times), times, **inputs, return_dict=False)[0].float()
    velocity = noise.config.prediction_type == "v_prediction"
    wanted = noise.get_velocity(latents, added, times) if velocity else added
    errors: Tensor = (guess - wanted).square().flatten(1).mean(1)
    if gamma:
        snr = compute_snr(noise, times)
        errors = errors * snr.clamp(max=gamma) / (snr + int(velocity))
    return errors.mean()


def save_training(fabric: Fabric, training: Training, path: Path) -> None:
    """Write a checkpoint, without what is frozen."""
    plain = getattr(training.unet, "module", training.unet)
    names = {name for name, p in plain.named_parameters() if p.requires_grad}
    fabric.save(path, vars(training), filter={"unet": lambda name, _: name in names})


def restore_training(fabric: Fabric, training: Training, path: Path) -> None:
    """Go on from where a checkpoint was written."""
    # Not strict: the frozen weights are not in it.
    fabric.load(path, vars(training), strict=False, weights_only=True)
    training.average.to(fabric.device)
