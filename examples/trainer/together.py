"""Several runs trained at once on one frozen trunk, each to what it would be alone.

They differ in learning rate and weight decay, so images, batches, model and start are the same for all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import medpeft
from medpeft.reports.costs import costs

from .data.batches import Batch, DataModule
from .errors import TrainerError
from .networks.model import check_model, where_adapted, without_memory
from .results.folder import begin, earlier
from .run import conclude, describe_history, evaluate, fit, run, untrained
from .settings import Settings
from .training.lightning_trainer import bare_trainer, make_trainer, quietly
from .training.module import Finetuning
from .training.several import Several
from .work import Work, describe_work, prepare, say

# At most this share of the operations that the runs do one by one. Between it and 1, what is saved in
# operations is lost in their shapes (benchmarks/together.py).
MOST_OPERATIONS = 0.65

End = Callable[[], dict[str, Any]]


class Together(Finetuning):
    """Runs in training at once: their loss is the sum of the losses, which have no parameter in common.

    Args:
        model: after `medpeft.apply`.
        finetunings: one a run, with its settings; they get the history.
        weights: of the loss, None for equal ones.

    Attributes:
        copies: of what trains in the model, one a run.
        best: what trained in each run, as it was after the run's best epoch.
        failed: by number of the run, why it broke off.
    """

    def __init__(self, model: nn.Module, finetunings: Sequence[Finetuning], weights: Tensor | None) -> None:
        copies = Several(model, len(finetunings))
        # What the runs have in common, such as the task, is read off the first.
        super().__init__(model, copies, finetunings[0].settings, finetunings[0].task, weights)
        self.copies = copies
        # Members of a tuple are no children: they share the model, which a checkpoint or a count of the
        # parameters would find again in each of them.
        self.finetunings = tuple(finetunings)
        self.best: list[dict[str, Tensor]] = [{} for _ in finetunings]
        self.failed: dict[int, TrainerError] = {}
        self._losses = torch.zeros(len(finetunings))
        self._images = 0

    def groups(self) -> list[dict[str, Any]]:
        """Give the groups of one run after another, each with the run's own rate and weight decay."""
        names = {id(parameter): name for name, parameter in self.copies.trained().items()}
        groups = []
        for number, finetuning in enumerate(self.finetunings):
            copied = self.copies.own(number)
            for group in finetuning.groups():
                parameters = [copied[names[id(parameter)]] for parameter in group["params"]]
                groups.append({**group, "params": parameters, "run": number})
        return groups

    def on_train_epoch_start(self) -> None:
        """Note the time, and count the losses anew."""
        super().on_train_epoch_start()
        self._losses, self._images = torch.zeros(len(self.finetunings), device=self.device), 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the sum of the runs' mean losses of a batch."""
        images, targets = batch
        losses = []
        for number, outputs in zip(self.copies.running, self.copies(images), strict=True):
            loss = self.task.loss(outputs, targets, self.weights)
            self._losses[number] += loss.detach() * len(images)
            losses.append(loss)
        self._images += len(images)
        return torch.stack(losses).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs of every run."""
        images, targets = batch
        for number, outputs in zip(self.copies.running, self.copies(images), strict=True):
            self.finetunings[number].see(outputs.float(), targets, watched=True)

    def on_validation_epoch_end(self) -> None:
        """Leave the scores for the end of the epoch."""

    def on_train_epoch_end(self) -> None:
        """Note how the epoch went for every run, keep the best, and go on with those that are not done."""
        # For the message of a run that breaks off. Of groups at several rates, as LoRA+ has, the last tells.
        rates = {group["run"]: group["lr"] for group in self.trainer.optimizers[0].param_groups}
        going_on = []
        for number in self.copies.running:
            finetuning = self.finetunings[number]
            try:
                finetuning.note(self._record(number), rates[number])
            except TrainerError as error:
                self.failed[number] = error
                continue
            say(finetuning.settings, f"lr {finetuning.settings.lr:g}  {finetuning.line()}")
            if finetuning.best_epoch == len(finetuning.history):
                copied = self.copies.own(number)
                self.best[number] = {name: value.detach().clone() for name, value in copied.items()}
            if not finetuning.stops_early():
                going_on.append(number)
        self.copies.running = going_on
        if not going_on:
            self.trainer.should_stop = True

    def _record(self, number: int) -> dict[str, float]:
        outputs, targets = self.finetunings[number].joined()
        # In single precision, as Lightning logs them.
        score = torch.tensor(self.task.watch(outputs, targets), dtype=torch.float32)
        return {
            "train_loss": float(self._losses[number] / self._images),
            "val_loss": float(self.task.kept_loss(outputs, targets, self.weights)),
            self.watched: float(score),
            "seconds": time.perf_counter() - self._begun,
        }


def train_together(requested: Sequence[Settings]) -> list[End]:
    """Train runs at once, without a checkpoint: what is cut off begins anew.

    The calls that it gives share the model: make one at a time. What a run would take by itself was not
    measured: its metrics have no `step_seconds`, `peak_bytes` or `seconds`. They have `together` instead,
    which tells how many `runs` took how many `seconds`.

    Args:
        requested: the settings of each run. They differ in `lr`, `weight_decay` and `output` alone, and
            `why_apart` has nothing against them; neither is looked at again here.

    Returns:
        A call for each run. It tests and saves the run's best epoch, and gives the metrics, as `run` does.
        If the run broke off, it raises why. If the run was finished before, it only gives the metrics.

    Raises:
        TrainerError, medpeft.MedpeftError: data, model, method or settings do not fit.
    """
    begun = time.perf_counter()
    requested = [settings.checked() for settings in requested]
    waiting = [settings for settings in requested if earlier(settings) is None]
    ends: dict[str, End] = {str(settings.output): partial(run, settings) for settings in requested}
    if not waiting:
        return list(ends.values())
    for note in check_model(waiting[0]):
        say(waiting[0], note)
    with quietly():
        trainer = bare_trainer(waiting[0])
        work = prepare(waiting[0])
        for settings in waiting:
            begin(settings)
        first, data = untrained(work)
        finetunings = [
            Finetuning(work.model, first.network, settings, work.task, first.weights) for settings in waiting
        ]
        together = Together(work.model, finetunings, first.weights)
        fit(trainer, together, data)
    shared = {"runs": len(waiting), "seconds": time.perf_counter() - begun}
    for number, settings in enumerate(waiting):
        ends[str(settings.output)] = partial(_end, work, data, together, number, shared)
    return list(ends.values())


def _end(
    work: Work, data: DataModule, together: Together, number: int, shared: dict[str, Any]
) -> dict[str, Any]:
    """Test and save one of the runs that were trained."""
    if number in together.failed:
        raise together.failed[number]
    finetuning = together.finetunings[number]
    together.copies.put(together.best[number])
    work = replace(work, settings=finetuning.settings)
    with quietly():
        trainer = make_trainer(finetuning.settings, finetuning.watched)
        record = describe_work(work, trainer) | describe_history(finetuning) | {"together": shared}
        trainer.validate(finetuning, data, verbose=False)
        trainer.test(finetuning, data, verbose=False)
        for logger in trainer.loggers:
            for epoch, scores in enumerate(finetuning.history):
                logger.log_metrics(scores, epoch)
        return conclude(work, trainer, finetuning, record | evaluate(work, finetuning))


def why_apart(settings: Settings, count: int) -> str | None:
    """Say why so many runs are better trained one by one; None where they are better trained at once.

    It is the only gate: a setting that cannot be trained at once is refused here, and `train_together` asks
    no more. It is looked at without memory: what the settings rule out, whether `torch.func.vmap` runs the
    model, and whether together the runs do at most `MOST_OPERATIONS` of what they do one by one.

    Args:
        settings: of one of them, checked.
        count: of the runs.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model or method, they do not fit, or the model
            does not run without memory.
    """
    usual = Settings()
    for name in ("cache_features", "memory", "compile", "checkpoint_activations", "precision", "devices"):
        if getattr(settings, name) != getattr(usual, name):
            return f"--{name.replace('_', '-')} {getattr(settings, name)} is for runs one by one"
    if settings.task == "segment":
        return "a decoder trains all of its convolutions, in each run its own"
    model, filled = without_memory(settings)
    model = medpeft.apply(model, settings.option, **where_adapted(settings, model, filled))
    # Which BatchNorms adapt shows in training alone.
    model.train()
    if any(_has_adapting_statistics(layer) for layer in model.modules()):
        return "the running statistics of its BatchNorms adapt, in each run to its own"
    side = settings.image_size
    images = torch.empty(settings.batch_size // settings.accumulate, 3, side, side, device="meta")
    one_by_one = count * costs(model, images).training_flops
    try:
        at_once = costs(Several(model, count), images).training_flops
    except medpeft.MedpeftError as error:
        return f"torch.func.vmap cannot run it: {error}"
    share = at_once / one_by_one
    if share > MOST_OPERATIONS:
        return (
            f"{count} at once take {share:.0%} of the operations, and above {MOST_OPERATIONS:.0%} nothing "
            "is gained"
        )
    return None


def _has_adapting_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
