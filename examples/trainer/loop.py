"""The training loop: epochs, early stopping, and a checkpoint after every epoch."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .batches import Batches
from .errors import TrainerError
from .metrics import macro_f1

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Training:
    """A model on its way: all that a checkpoint has to hold.

    Attributes:
        model: the adapted model, on its device.
        optimizer: over its trainable parameters.
        schedule: stepped after every batch.
        history: one record an epoch: `train_loss`, `val_loss`, `val_macro_f1`, `seconds`.
        best: the trained state with the highest validation macro-F1 so far, on the CPU.
        best_epoch: its epoch, counted from 1.
        step_seconds: how long each optimizer step took, without waiting for its images.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    step_seconds: list[float] = field(default_factory=list)


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Raise the learning rate over the first tenth of the steps, then lower it to 0 in a cosine."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)


def fit(
    fabric: Fabric,
    training: Training,
    train: Batches,
    val: Batches,
    loss: Loss,
    *,
    epochs: int,
    patience: int,
    seed: int,
    after_epoch: Callable[[Training], None] = lambda training: None,
    quiet: bool = False,
) -> None:
    """Train until the epochs are over or validation macro-F1 has not risen for `patience` epochs.

    Ends with the best state in the model.

    Raises:
        TrainerError: the loss is no longer a number.
    """
    while len(training.history) < epochs and not _stale(training, patience):
        start, epoch = time.perf_counter(), len(training.history) + 1
        # Each epoch draws from a seed of its own: a resumed run repeats the uninterrupted one.
        fabric.seed_everything(1000 * seed + epoch, workers=True, verbose=False)
        record = {"train_loss": train_epoch(fabric, training, train, loss, f"epoch {epoch}", quiet)}
        logits, labels = predict(training.model, val)
        record["val_loss"] = float(loss(logits, labels))
        record["val_macro_f1"] = macro_f1(logits, labels)
        record["seconds"] = time.perf_counter() - start
        if record["val_macro_f1"] > _best_score(training):
            training.best, training.best_epoch = trained_state(training.model), epoch
        training.history.append(record)
        after_epoch(training)
    training.model.load_state_dict(training.best, strict=False)


def train_epoch(fabric: Fabric, training: Training, batches: Batches, loss: Loss, title: str, quiet: bool) -> float:
    """Take one step for each batch; give the mean loss of the images."""
    training.model.train()
    total, count = torch.zeros((), device=fabric.device), 0
    for images, labels in tqdm(batches, desc=title, unit="batch", leave=False, disable=quiet):
        start = time.perf_counter()
        value = loss(training.model(images), labels)
        training.optimizer.zero_grad()
        fabric.backward(value)
        training.optimizer.step()
        training.schedule.step()
        total += value.detach() * len(labels)
        count += len(labels)
        if fabric.device.type == "cuda":
            torch.cuda.synchronize(fabric.device)
        training.step_seconds.append(time.perf_counter() - start)
    mean = float(total) / count
    if not math.isfinite(mean):
        raise TrainerError(
            f"The training loss became {mean} in {title}. Lower --lr (the rate is now "
            f"{training.schedule.get_last_lr()[0]:.2g}) or check the images."
        )
    return mean


@torch.no_grad()
def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Give the logits (N, C) and the labels (N,) of all batches, in order, on the device."""
    model.eval()
    pairs = [(model(images), labels) for images, labels in batches]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits).float(), torch.cat(labels)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes, the trainable parameters and the buffers, to the CPU."""
    state = model.state_dict(keep_vars=True).items()
    changes = {k: v for k, v in state if v.requires_grad or not isinstance(v, nn.Parameter)}
    return {k: v.detach().to("cpu", copy=True) for k, v in changes.items()}


def save_training(training: Training, settings: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a crash while writing leaves the one before."""
    content = {
        "settings": settings,
        "model": trained_state(training.model),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "history": training.history,
        "best": training.best,
        "best_epoch": training.best_epoch,
        "step_seconds": training.step_seconds,
    }
    unfinished = path.with_suffix(".unfinished")
    torch.save(content, unfinished)
    os.replace(unfinished, path)


def load_training(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with the `settings` of the run that wrote it."""
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def restore_training(training: Training, content: dict[str, Any]) -> None:
    """Go on from where a checkpoint was written."""
    training.model.load_state_dict(content["model"], strict=False)
    training.optimizer.load_state_dict(content["optimizer"])
    training.schedule.load_state_dict(content["schedule"])
    training.history, training.best = content["history"], content["best"]
    training.best_epoch, training.step_seconds = content["best_epoch"], content["step_seconds"]


def _best_score(training: Training) -> float:
    return training.history[training.best_epoch - 1]["val_macro_f1"] if training.best else -1.0


def _stale(training: Training, patience: int) -> bool:
    return len(training.history) - training.best_epoch >= patience
