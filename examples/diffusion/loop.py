"""The training loop: noise is added to latents and the UNet guesses it; all that a step draws follows from its number.

So a run that was interrupted repeats, after its last checkpoint, what it would have done.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from trainer.errors import TrainerError

import medpeft

from .cache import Condition, Encoded


@dataclass
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        batch_size: images on each device.
        snr_gamma: the bound of min-SNR weighting, 0 for none.
        drop_text: the share of images that train without their text, which guidance needs.
        ema: the decay of the moving average once it is warm.
        seed: of batches, noise and times.
        clip: the largest norm of the gradient.
    """

    steps: int
    batch_size: int = 16
    snr_gamma: float = 5.0
    drop_text: float = 0.1
    ema: float = 0.995
    seed: int = 0
    clip: float = 1.0


class Average:
    """Exponential moving average of the trainable parameters, and of them alone."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.values = {name: p.detach().float().clone() for name, p in trainable(model)}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the parameters; at first faster, so that random initial values are soon forgotten."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in trainable(model):
            self.values[name].lerp_(p.detach().to(self.values[name]), 1 - decay)

    @contextmanager
    def used(self, model: nn.Module) -> Iterator[None]:
        """Put the average into the model for the duration of a `with` block."""
        now = {name: p.detach().clone() for name, p in trainable(model)}
        self.put(model)
        try:
            yield
        finally:
            _copy(now, model)

    def put(self, model: nn.Module) -> None:
        """Put the average into the model."""
        _copy(self.values, model)


@dataclass
class Training:
    """A UNet on its way: all that a checkpoint has to hold.

    Attributes:
        unet: the adapted model, as Fabric set it up.
        optimizer: over its trainable parameters.
        schedule: stepped after every step.
        average: the moving average, which is what is saved in the end.
        losses: one of each step, weighted.
    """

    unet: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    average: Average
    losses: list[float] = field(default_factory=list)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return len(self.losses)


def trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Give the parameters that train, by name."""
    return ((name, p) for name, p in plain(model).named_parameters() if p.requires_grad)


def plain(model: nn.Module) -> nn.Module:
    """Give the model inside what Fabric put around it."""
    inside: nn.Module = getattr(model, "module", model)
    return inside


@torch.no_grad()
def _copy(values: dict[str, Tensor], model: nn.Module) -> None:
    for name, p in trainable(model):
        p.copy_(values[name])


def fit(
    fabric: Fabric,
    training: Training,
    noise: Any,
    data: Encoded,
    recipe: Recipe,
    after_step: Callable[[Training], None] = lambda training: None,
) -> None:
    """Train up to the recipe's number of steps.

    Args:
        fabric: launched.
        training: at its beginning, or restored.
        noise: the pipeline's schedule of noise.
        data: latents and texts.
        recipe: how to train.
        after_step: called after every step.

    Raises:
        TrainerError: the loss is no longer a number.
    """
    bar = tqdm(
        total=recipe.steps,
        initial=training.step,
        desc="training",
        unit="step",
        leave=False,
        disable=fabric.global_rank > 0,
    )
    training.unet.train()
    while training.step < recipe.steps:
        loss = take_step(fabric, training, noise, data, recipe)
        if not math.isfinite(loss):
            raise TrainerError(
                f"The loss became {loss} in step {training.step + 1}. Lower --lr (the rate is now "
                f"{training.schedule.get_last_lr()[0]:.2g}), or check the images."
            )
        training.losses.append(loss)
        bar.update()
        after_step(training)
        training.unet.train()
    bar.close()


def take_step(fabric: Fabric, training: Training, noise: Any, data: Encoded, recipe: Recipe) -> float:
    """Take one step; give its loss, the mean over all devices."""
    # On the CPU, so that every kind of device draws the same.
    generator = torch.Generator().manual_seed(hash((recipe.seed, training.step, fabric.global_rank)) % 2**63)
    rows = rows_of(len(data), recipe, training.step, fabric.global_rank, fabric.world_size)
    latents, condition = data.batch(rows, generator)
    dropped = torch.rand(len(rows), generator=generator) < recipe.drop_text
    for name, values in condition.items():
        values[dropped] = data.empty[name].to(values)
    times = torch.randint(noise.config.num_train_timesteps, (len(rows),), generator=generator)
    added = torch.randn(latents.shape, generator=generator)
    latents, times, added = (tensor.to(fabric.device) for tensor in (latents, times, added))
    inputs = unet_inputs({name: values.to(fabric.device) for name, values in condition.items()}, data.size)
    loss = denoising_loss(training.unet, noise, latents, inputs, times, added, recipe.snr_gamma)
    training.optimizer.zero_grad()
    fabric.backward(loss)
    fabric.clip_gradients(training.unet, training.optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
    training.optimizer.step()
    training.schedule.step()
    training.average.update(training.unet)
    return float(fabric.all_reduce(loss.detach(), reduce_op="mean"))  # type: ignore[arg-type]  # a tensor gives a tensor


def unet_inputs(condition: Condition, size: int) -> dict[str, Any]:
    """Name a condition as the UNet of Stable Diffusion or SDXL takes it.

    SDXL is told the image's size, what was cropped off and the size wanted: Podell et al. (2023), arXiv 2307.01952, §2.2.
    """
    inputs: dict[str, Any] = {"encoder_hidden_states": condition["text"]}
    if "pooled" in condition:
        pooled = condition["pooled"]
        sizes = pooled.new_tensor([size, size, 0, 0, size, size]).expand(len(pooled), 6)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    return inputs


def rows_of(length: int, recipe: Recipe, step: int, rank: int, devices: int) -> list[int]:
    """Say which images a device takes in a step: every image once, in a new order, before any comes again."""
    first = (step * devices + rank) * recipe.batch_size
    places = range(first, first + recipe.batch_size)
    return [_order(length, recipe.seed, place // length)[place % length] for place in places]


@lru_cache(maxsize=4)
def _order(length: int, seed: int, epoch: int) -> list[int]:
    order: list[int] = torch.randperm(
        length, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch)
    ).tolist()
    return order


def denoising_loss(
    unet: nn.Module,
    noise: Any,
    latents: Tensor,
    inputs: dict[str, Any],
    times: Tensor,
    added: Tensor,
    snr_gamma: float,
) -> Tensor:
    """Mean squared error of what the UNet guesses, weighted by min-SNR.

    Args:
        unet: guesses the noise, or the velocity where the schedule says so.
        noise: the schedule.
        latents: (B, C, h, w).
        inputs: what the UNet is told besides, as from `unet_inputs`.
        times: (B,).
        added: standard normal noise (B, C, h, w).
        snr_gamma: γ, 0 for no weighting.
    """
    guess = unet(noise.add_noise(latents, added, times), times, **inputs, return_dict=False)[0].float()
    velocity = noise.config.prediction_type == "v_prediction"
    wanted = noise.get_velocity(latents, added, times) if velocity else added
    errors = (guess - wanted).square().flatten(1).mean(1)
    loss: Tensor = (
        errors * weights(noise.alphas_cumprod.to(times.device)[times], snr_gamma, velocity)
    ).mean()
    return loss


def weights(kept: Tensor, snr_gamma: float, velocity: bool) -> Tensor:
    """Weigh the error of each time by min(SNR, γ)/SNR, or by min(SNR, γ)/(SNR + 1) for the velocity.

    Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (2023), arXiv 2303.09556, section 3.4.

    Args:
        kept: (B,), the share ᾱ of the signal's variance at each time; SNR = ᾱ/(1 − ᾱ).
        snr_gamma: γ, 0 for weights of one.
        velocity: whether the velocity is guessed.
    """
    if not snr_gamma:
        return torch.ones_like(kept)
    snr = kept / (1 - kept)
    return snr.clamp(max=snr_gamma) / (snr + 1 if velocity else snr)


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Raise the learning rate over the first twentieth of the steps, then lower it to a tenth in a cosine."""
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)


def start_training(
    fabric: Fabric, unet: nn.Module, recipe: Recipe, *, lr: float, weight_decay: float
) -> Training:
    """Put an adapted UNet at the beginning of a recipe."""
    optimizer = torch.optim.AdamW(medpeft.parameter_groups(unet, lr=lr, weight_decay=weight_decay))
    schedule = warmup_cosine(optimizer, recipe.steps)
    on_device, stepped = fabric.setup(unet, optimizer)
    return Training(on_device, stepped, schedule, Average(on_device, recipe.ema))


def save_training(training: Training, settings: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    content = {
        "settings": settings,
        "trained": {name: p.detach().cpu().clone() for name, p in trainable(training.unet)},
        "average": {name: value.cpu() for name, value in training.average.values.items()},
        "updates": training.average.updates,
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "losses": training.losses,
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def load_training(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with the `settings` of the run that wrote it."""
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def restore_training(training: Training, content: dict[str, Any]) -> None:
    """Go on from where a checkpoint was written."""
    _copy(content["trained"], training.unet)
    for name, value in training.average.values.items():
        value.copy_(content["average"][name])
    training.average.updates = content["updates"]
    training.optimizer.load_state_dict(content["optimizer"])
    training.schedule.load_state_dict(content["schedule"])
    training.losses = content["losses"]
