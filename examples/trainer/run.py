"""One run: from settings to an adapter, its scores and everything else that it leaves."""

import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import torch

import medpeft

from .data.batches import DataModule
from .exports import check_exports, export
from .judging.subgroups import gaps
from .networks.memory import within_memory
from .networks.model import check_model
from .results.card import versions, write_card
from .results.cost import forget_peak, peak_memory
from .results.folder import (
    begin,
    describe,
    earlier,
    save_adapter,
    write_results,
)
from .results.gallery import SHOWN_MISTAKES, draw_gallery, without_checkpointing
from .settings import Settings
from .tasks import TASKS, Mistake, Outcome
from .training.lightning_trainer import make_trainer, quietly
from .training.module import Finetuning
from .work import Work, describe_work, parts_of, prepare, say


def run(settings: Settings, *, callbacks: Sequence[lightning.Callback] = ()) -> dict[str, Any]:
    """Train, test and save; give what metrics.json holds.

    A finished run with the same settings is not run again; one that was cut off goes on after its last whole
    epoch, as if it had never stopped.

    Args:
        settings: of the run; their defaults may still be open.
        callbacks: further ones for Lightning's `Trainer`.

    Raises:
        TrainerError, medpeft.MedpeftError: data, model, method or settings do not fit.
    """
    start = time.perf_counter()
    settings = settings.checked()
    check_exports(settings)
    if settings.memory is not None:
        settings, note = within_memory(settings, settings.memory)
        say(settings, note)
    finished = earlier(settings)
    if finished is not None:
        task = TASKS[settings.task]
        score = f"{task.words[task.score]} {finished['test'][task.score]:.4f}"
        say(settings, f"{settings.output} has this run already: {score}")
        export_model(settings)
        return finished
    for note in check_model(settings):
        say(settings, note)
    with quietly():
        trainer = make_trainer(settings, f"val_{TASKS[settings.task].score}", callbacks)
        work = prepare(settings)
        record = describe_work(work, trainer)
        if trainer.is_global_zero:
            begin(settings)
        say(settings, describe(record["images"], work.images, work.found))
        say(settings, f"\n{medpeft.report(work.model)}\n")
        module = train(work, trainer)
        record |= describe_cost(module) | describe_history(module) | evaluate(work, module)
        record["seconds"] = time.perf_counter() - start
        return conclude(work, trainer, module, record)


def train(work: Work, trainer: lightning.Trainer) -> Finetuning:
    """Train from the start or the last whole epoch; give the best epoch, with its outputs."""
    module, data = untrained(work)
    folder = Path(str(work.settings.output)) / "checkpoints"
    last = None
    if (folder / "last.ckpt").exists():
        last = folder / "last.ckpt"
    device = trainer.strategy.root_device
    forget_peak(device)
    fit(trainer, module, data, last)
    module.peak = peak_memory(device)
    # Each loads the best epoch's weights into the model, which are then those that are saved.
    best = folder / "best.ckpt"
    trainer.validate(module, data, best, verbose=False)
    trainer.test(module, data, best, verbose=False)
    return module


def untrained(work: Work) -> tuple[Finetuning, DataModule]:
    """Give what is trained, before it is, and its data."""
    settings = work.settings
    network, parts = parts_of(work)
    if settings.compile:
        network.compile()
    weights = None
    if settings.class_weights:
        weights = work.task.weigh(work.images.targets[work.found["train"]])
    return Finetuning(work.model, network, settings, work.task, weights), DataModule(parts, settings)


def fit(
    trainer: lightning.Trainer, module: Finetuning, data: DataModule, checkpoint: Path | None = None
) -> None:
    """Train, from the state in a checkpoint if one is given.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except SystemExit as error:
        # Lightning ends the process at an interrupt, and turns further ones off. Only the main thread, which
        # alone is interrupted, may turn them on again.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error


def describe_cost(module: Finetuning) -> dict[str, Any]:
    """Give the cost of the training."""
    return {
        "step_seconds": median(module.step_seconds) * module.settings.accumulate,
        "peak_bytes": module.peak[0],
        "peak_memory": module.peak[1],
    }


def describe_history(module: Finetuning) -> dict[str, Any]:
    """Give the history of the training."""
    return {
        "best_epoch": module.best_epoch,
        "score": module.task.score,
        "best_val_score": module.history[module.best_epoch - 1][module.watched],
        "history": module.history,
    }


def outcome_of(module: Finetuning, part: str, fitted: dict[str, Any]) -> Outcome:
    """Give what the best epoch says about a part."""
    outputs, targets = module.outputs[part]
    return Outcome(outputs.cpu(), targets.cpu(), fitted)


def evaluate(work: Work, module: Finetuning) -> dict[str, Any]:
    """Fit what the predictions need to the validation part, and score that part and the test with it."""
    fitted = work.task.fit(*module.outputs["val"])
    validation = outcome_of(module, "val", fitted)  # It sees what is added to `fitted` from here on.
    fitted |= work.task.fit_thresholds(validation, work.settings.threshold)
    fitted |= work.task.fit_sets(validation, work.settings.coverage)
    result: dict[str, Any] = {"fitted": fitted}
    for part in ("val", "test"):
        result[part] = work.task.scores(outcome_of(module, part, fitted))
    test = outcome_of(module, "test", fitted)
    groups = work.images.groups[work.found["test"]]
    result["test"]["intervals"] = work.task.intervals(test, groups, work.settings.seed)
    if work.images.subgroups:
        subgroups = [work.images.subgroups[i] for i in work.found["test"]]
        found = work.task.score_subgroups(test, subgroups, groups, work.settings.seed)
        result["test_subgroups"], result["test_gaps"] = found, gaps(found, work.task.words)
    return result


def conclude(
    work: Work, trainer: lightning.Trainer, module: Finetuning, record: dict[str, Any]
) -> dict[str, Any]:
    """Print the scores and write everything that a run leaves; give the metrics as they are in their file."""
    settings, task, rows = work.settings, work.task, work.found["test"]
    record["versions"], record["date"] = versions(), time.strftime("%Y-%m-%d")
    record["device"] = str(trainer.strategy.root_device)
    test = outcome_of(module, "test", record["fitted"])
    say(settings, f"\nTest on {len(rows)} images")
    say(settings, task.table(test, record["test"]))
    if "test_subgroups" in record:
        say(settings, "\n" + task.subgroup_table(record["test_subgroups"]))
    # What is sharded is gathered by all processes together; of equal copies one is enough.
    if settings.strategy == "fsdp2" or trainer.is_global_zero:
        save_adapter(settings, task, work.model, work.preprocessing, record)
    # A process that is still reading the checkpoint is waited for.
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        names = [work.images.names[i] for i in rows]
        mistakes = task.mistakes(test)
        record["mistakes"] = [
            {"path": names[one.row], "words": one.words} for one in mistakes[:SHOWN_MISTAKES]
        ]
        if mistakes and not settings.no_figures:
            draw_mistakes(work, mistakes)
        write_card(settings, task, record)
        record = write_results(settings, task, names, test, record)
        if not (settings.no_figures or settings.strategy == "fsdp2"):
            part = trainer.datamodule.parts["test"]  # type: ignore[attr-defined]  # Lightning sets it
            folder = Path(str(settings.output))
            task.show(module.network, part, test, names, folder)
    trainer.strategy.barrier()
    say(settings, f"\nSaved the adapter, the metrics and the predictions to {settings.output}")
    if trainer.is_global_zero:
        export_model(settings)
    return record


def export_model(settings: Settings) -> None:
    """Write what `--export` asks for, and say where."""
    for path in export(settings):
        say(settings, f"Exported {path}")


def draw_mistakes(work: Work, mistakes: Sequence[Mistake]) -> None:
    """Draw the most confident mistakes on the test; where the network looked, unless it is sharded."""
    rows, network = work.found["test"], None
    if work.settings.strategy != "fsdp2":
        network = work.model.cpu()
        without_checkpointing(network)
    names = [work.images.names[i] for i in rows]
    path = Path(str(work.settings.output)) / "mistakes.png"
    draw_gallery(
        network, mistakes, work.images.pixels[torch.from_numpy(rows)], names, work.preprocessing, path
    )
