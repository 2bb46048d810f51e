"""The training loop: steps of exactly the images that the order says, early stopping, checkpoints in between."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from .batches import Batches
from .checkpoint import Training, gathered, restore_state, trained_state
from .errors import TrainerError
from .metrics import macro_f1
from .order import Order, step_seed

Say = Callable[[str], None]


@dataclass
class Plan:
    """How to train, apart from the model.

    Attributes:
        batches: the training part, in the order that `order` gives.
        order: of the images; the sampler of `batches`.
        labels: (N,) of the training part, on the CPU.
        val: the validation part.
        weights: (C,) of the classes in the loss, on the device; None for equal ones.
        epochs: at most.
        patience: epochs without a better validation macro-F1 before it stops.
        seed: of the run.
        save_every: steps between checkpoints within an epoch, 0 for none.
        save: writes a checkpoint.
        say: takes a line a epoch.
        quiet: show no progress.
    """

    batches: Batches
    order: Order
    labels: Tensor
    val: Batches
    weights: Tensor | None
    epochs: int
    patience: int
    seed: int
    save_every: int = 0
    save: Callable[[Training], None] = lambda training: None
    say: Say = lambda line: None
    quiet: bool = False


def warmup_cosine(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Raise the learning rate over the first tenth of the steps, then lower it to 0 in a cosine."""
    warmup = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)


def fit(fabric: Fabric, training: Training, plan: Plan) -> None:
    """Train until the epochs are over or validation macro-F1 has not risen for `patience` epochs.

    Ends with the best state in the model.

    Raises:
        TrainerError: the loss is no longer a number.
    """
    while len(training.history) < plan.epochs and len(training.history) - training.best_epoch < plan.patience:
        start, epoch = time.perf_counter(), len(training.history) + 1
        record = {"train_loss": train_epoch(fabric, training, plan, epoch)}
        logits, labels = predict(fabric, training.network, plan.val)
        record["val_loss"] = float(cross_entropy(logits, labels, plan.weights))
        record["val_macro_f1"] = macro_f1(logits, labels)
        record["seconds"] = time.perf_counter() - start
        if record["val_macro_f1"] > _best_score(training):
            training.best, training.best_epoch = trained_state(training.model), epoch
        training.history.append(record)
        training.step, training.loss = 0, torch.zeros_like(training.loss)
        plan.save(training)
        plan.say(epoch_line(training))
    restore_state(training.model, training.best)


def train_epoch(fabric: Fabric, training: Training, plan: Plan, epoch: int) -> float:
    """Take the steps that are left of an epoch; give the mean loss of all its images."""
    training.network.train()
    training.loss = training.loss.to(fabric.device)
    plan.order.begin(epoch, training.step)
    loaded = iter(plan.batches)
    remaining = range(training.step, plan.order.steps)
    shown = tqdm(
        remaining, f"epoch {epoch}", unit="step", leave=False, disable=plan.quiet or not fabric.is_global_zero
    )
    for step in shown:
        take_step(fabric, training, plan, step, islice(loaded, plan.order.accumulate))
        training.step = step + 1
        if plan.save_every and training.step % plan.save_every == 0 and training.step < plan.order.steps:
            plan.save(training)
    mean = float(gathered(fabric, training.loss[0]).sum() / training.loss[1])
    if not math.isfinite(mean):
        raise TrainerError(
            f"The training loss became {mean} in epoch {epoch}. Lower --lr (the rate is now "
            f"{training.schedule.get_last_lr()[0]:.2g}) or check the images."
        )
    return mean


def take_step(
    fabric: Fabric, training: Training, plan: Plan, step: int, micro_batches: Iterator[tuple[Tensor, Tensor]]
) -> None:
    """Make one optimizer step of the mean loss over its images, on however many processes and micro-batches they lie."""
    labels = plan.labels[plan.order.images(step)].to(fabric.device)
    weight = float(len(labels)) if plan.weights is None else float(plan.weights[labels].sum())
    seconds = 0.0
    for number, (images, targets) in enumerate(micro_batches, start=1):
        # After the images are loaded, which may draw too: a loader draws a seed when it begins.
        torch.manual_seed(step_seed(plan.seed, plan.order.epoch, step, fabric.global_rank, number))
        start = time.perf_counter()
        with fabric.no_backward_sync(training.network, enabled=number < plan.order.accumulate):
            loss = cross_entropy(training.network(images), targets, plan.weights, reduction="sum")
            # Processes average their gradients, so each brings its sum multiplied by their number.
            fabric.backward(loss * (fabric.world_size / weight))
        training.loss[0] += loss.detach()
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.schedule.step()
    share_buffers(fabric, training.model)
    training.loss[1] += weight
    if fabric.device.type == "cuda":
        torch.cuda.synchronize(fabric.device)
    training.step_seconds.append(seconds + time.perf_counter() - start)


def share_buffers(fabric: Fabric, model: nn.Module) -> None:
    """Give every process the first one's BatchNorm statistics: DDP does it before a forward, FSDP2 never."""
    if fabric.world_size > 1 and any(
        m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ):
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)


@torch.no_grad()
def predict(fabric: Fabric, model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Give the logits (N, C) and the labels (N,) of all batches, in order, on the device of every process."""
    model.eval()
    pairs = [(model(images), labels) for images, labels in batches]
    logits, labels = (torch.cat(found) for found in zip(*pairs, strict=True))
    if fabric.world_size > 1:
        # Process r holds the images r, r + world, …, and the last ones may hold a repeated first image.
        count = len(batches.dataset)  # type: ignore[arg-type]
        logits, labels = (gathered(fabric, t).transpose(0, 1).flatten(0, 1)[:count] for t in (logits, labels))
    return logits.float(), labels


def epoch_line(training: Training) -> str:
    """Sum up the last epoch in one line."""
    epoch, last = len(training.history), training.history[-1]
    kept = "  *" if training.best_epoch == epoch else ""
    return (
        f"epoch {epoch:>3}  train loss {last['train_loss']:.4f}  val loss {last['val_loss']:.4f}  "
        f"val macro-F1 {last['val_macro_f1']:.4f}  {last['seconds']:5.1f} s{kept}"
    )


def _best_score(training: Training) -> float:
    return training.history[training.best_epoch - 1]["val_macro_f1"] if training.best else -1.0
