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

from .data import Batch, DataModule
from .errors import TrainerError
from .lightning_trainer import bare_trainer, make_trainer, quietly
from .models import check_model, where_adapted, without_memory
from .module import Finetuning
from .results import begin, earlier
from .run import conclude, evaluate, fit, how_it_went, run, untrained
from .settings import Settings
from .several import Several
from .work import Work, describe_work, prepare, say

OWN = ("lr", "weight_decay", "output")  # in which runs that are trained at once differ
# Share of the operations of the runs one by one. Between it and 1, what is saved in operations is lost in
# their shapes (benchmarks/together.py).
MOST = 0.65

End = Callable[[], dict[str, Any]]


class Together(Finetuning):
    """Runs in training at once: their loss is the sum of the losses, which have no parameter in common.

    Args:
        model: after `medpeft.apply`.
        runs: one module a run, with its settings; they get the history.
        weights: of the loss, None for equal ones.

    Attributes:
        best: what trained in each run, as it was after the run's best epoch.
        failed: by number of the run, why it broke off.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Finetuning], weights: Tensor | None) -> None:
        several = Several(model, len(runs))
        super().__init__(model, several, runs[0].settings, runs[0].task, weights)
        self.several = several
        # Not children: they share the model.
        self.runs = tuple(runs)
        self.best: list[dict[str, Tensor]] = [{} for _ in runs]
        self.failed: dict[int, TrainerError] = {}
        self._losses = torch.zeros(len(runs))
        self._images = 0

    def groups(self) -> list[dict[str, Any]]:
        """Give the groups of one run after another, each with the run's own rate and weight decay."""
        groups = []
        for number, one in enumerate(self.runs):
            own = self.several.own(number)
            names = {id(p): name for name, p in self.several.trained().items()}
            for group in one.groups():
                group["params"] = [own[names[id(p)]] for p in group["params"]]
                groups.append({**group, "run": number})
        return groups

    def on_train_epoch_start(self) -> None:
        """Note the time, and count the losses anew."""
        super().on_train_epoch_start()
        self._losses, self._images = torch.zeros(len(self.runs), device=self.device), 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the sum of the runs' mean losses of a batch."""
        images, targets = batch
        losses = []
        for number, outputs in zip(self.several.running, self.several(images), strict=True):
            loss = self.task.loss(outputs, targets, self.weights)
            self._losses[number] += loss.detach() * len(images)
            losses.append(loss)
        self._images += len(images)
        return torch.stack(losses).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the outputs of every run."""
        images, targets = batch
        for number, outputs in zip(self.several.running, self.several(images), strict=True):
            self.runs[number].see(outputs.float(), targets, watched=True)

    def on_validation_epoch_end(self) -> None:
        """Leave the scores for the end of the epoch."""

    def on_train_epoch_end(self) -> None:
        """Note how the epoch went for every run, keep the best, and go on with those that are not done."""
        rates = {group["run"]: group["lr"] for group in self.trainer.optimizers[0].param_groups}
        going_on = []
        for number in self.several.running:
            one = self.runs[number]
            try:
                one.note(self._record(number), rates[number])
            except TrainerError as error:
                self.failed[number] = error
                continue
            say(one.settings, f"lr {one.settings.lr:g}  {one.line()}")
            if one.best_epoch == len(one.history):
                self.best[number] = {name: p.detach().clone() for name, p in self.several.own(number).items()}
            if not one.stops_early():
                going_on.append(number)
        self.several.running = going_on
        if not going_on:
            self.trainer.should_stop = True

    def _record(self, number: int) -> dict[str, float]:
        outputs, targets = self.runs[number].joined()
        # In single precision, as Lightning logs them.
        score = torch.tensor(self.task.watch(outputs, targets), dtype=torch.float32)
        return {
            "train_loss": float(self._losses[number] / self._images),
            "val_loss": float(self.task.kept_loss(outputs, targets, self.weights)),
            self.watched: float(score),
            "seconds": time.perf_counter() - self._begun,
        }


def train_together(several: Sequence[Settings]) -> list[End]:
    """Train runs at once, without a checkpoint: what is cut off begins anew.

    Args:
        several: of runs that differ in `OWN` alone, and that `why_apart` has nothing against.

    Returns:
        For each run the call that tests and saves its best epoch and gives its metrics, as `run` does; it
        raises what broke the run off. The calls share the model: one at a time. Of a run that was finished
        before, it only gives the metrics. What a run would take by itself was not measured, so in place of
        `step_seconds`, `peak_bytes` and `seconds` the metrics have `together`: how many `runs` took how many
        `seconds`.

    Raises:
        TrainerError, medpeft.MedpeftError: data, model, method or settings do not fit.
    """
    begun = time.perf_counter()
    several = [own.checked() for own in several]
    waiting = [own for own in several if earlier(own) is None]
    ends: dict[str, End] = {str(own.output): partial(run, own) for own in several}
    if not waiting:
        return list(ends.values())
    for note in check_model(waiting[0]):
        say(waiting[0], note)
    with quietly():
        trainer = bare_trainer(waiting[0])
        work = prepare(waiting[0])
        for own in waiting:
            begin(own)
        first, data = untrained(work)
        runs = [Finetuning(work.model, first.network, own, work.task, first.weights) for own in waiting]
        together = Together(work.model, runs, first.weights)
        fit(trainer, together, data)
    shared = {"runs": len(runs), "seconds": time.perf_counter() - begun}
    for number, own in enumerate(waiting):
        ends[str(own.output)] = partial(_end, work, data, together, number, shared)
    return list(ends.values())


def _end(
    work: Work, data: DataModule, together: Together, number: int, shared: dict[str, Any]
) -> dict[str, Any]:
    """Test and save one of the runs that were trained."""
    if number in together.failed:
        raise together.failed[number]
    module = together.runs[number]
    together.several.put(together.best[number])
    work = replace(work, settings=module.settings)
    with quietly():
        trainer = make_trainer(module.settings, module.watched)
        record = describe_work(work, trainer) | how_it_went(module) | {"together": shared}
        trainer.validate(module, data, verbose=False)
        trainer.test(module, data, verbose=False)
        for logger in trainer.loggers:
            for epoch, one in enumerate(module.history):
                logger.log_metrics(one, epoch)
        return conclude(work, trainer, module, record | evaluate(work, module))


def why_apart(settings: Settings, count: int) -> str | None:
    """Say why so many runs are better trained one by one; None where they are better trained at once.

    It is looked at without memory: what the settings rule out, whether `torch.func.vmap` runs the model, and
    whether together the runs do at most `MOST` of the operations that they do one by one.

    Args:
        settings: of one of them, checked.
        count: of the runs.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model or method, or they do not fit.
    """
    usual = Settings()
    for name in ("cache_features", "memory", "compile", "checkpoint_activations", "precision", "devices"):
        if getattr(settings, name) != getattr(usual, name):
            return f"--{name.replace('_', '-')} {getattr(settings, name)} is for runs one by one"
    if settings.task == "segment":
        return "a decoder trains all of its convolutions, in each run its own"
    model, filled = without_memory(settings)
    model = medpeft.apply(model, settings.option, **where_adapted(settings, model, filled))
    if any(_adapts(layer) for layer in model.train().modules()):
        return "the running statistics of its BatchNorms adapt, in each run to its own"
    side = settings.image_size
    images = torch.empty(settings.batch_size // settings.accumulate, 3, side, side, device="meta")
    try:
        apart = count * costs(model, images).training_flops
        share = costs(Several(model, count), images).training_flops / apart
    except medpeft.MedpeftError as error:
        return f"torch.func.vmap cannot run it: {error}"
    if share > MOST:
        return f"{count} at once take {share:.0%} of the operations, and above {MOST:.0%} nothing is gained"
    return None


def _adapts(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training
