"""One run: from settings to an adapter, its scores and everything else that it leaves."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import numpy as np
import timm
import torch
from torch import nn

import medpeft

from .data import DataModule, FeaturePart, Part, Preprocessing, augmentation
from .features import cached_features, trained_head
from .images import Integers
from .joint import masked_parts
from .lightning_trainer import make_trainer, quietly
from .models import adapted_model, check_model, input_statistics
from .module import Finetuning
from .results import (
    begin,
    describe,
    earlier,
    forget_peak,
    peak_memory,
    save_adapter,
    saved_bytes,
    write_results,
)
from .rows import Images
from .settings import Settings
from .sources import read_data
from .splits import split
from .tasks import TASKS, Outcome, Task


@dataclass
class Work:
    """What one run works with.

    Attributes:
        settings: checked.
        task: what is asked of the images.
        images: the data.
        found: the positions of the images in each part.
        model: adapted.
        preprocessing: from a file to the model's input.
    """

    settings: Settings
    task: Task
    images: Images
    found: dict[str, Integers]
    model: nn.Module
    preprocessing: Preprocessing


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
    begun = time.perf_counter()
    settings = settings.checked()
    finished = earlier(settings)
    if finished is not None:
        kind = TASKS[settings.task]
        score = f"{kind.words[kind.score]} {finished['test'][kind.score]:.4f}"
        say(settings, f"{settings.output} has this run already: {score}")
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
        record |= how_it_went(module) | evaluate(work, module)
        record["seconds"] = time.perf_counter() - begun
        record["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
        return conclude(work, trainer, module, record)


def prepare(settings: Settings) -> Work:
    """Read and split the images, and adapt the model that fits them."""
    images = read_data(settings)
    found = split(images, settings)
    task = TASKS[settings.task](images.classes).informed(images.details)
    task = task.prepared(images.targets[found["train"]])
    lightning.seed_everything(settings.seed, verbose=False)
    stored = tuple(images.pixels.shape[2:])
    model = adapted_model(settings, task.outputs, len(stored))
    mean, std = input_statistics(model)
    preprocessing = Preprocessing(stored, settings.image_size, mean, std)
    return Work(settings, task, images, found, model, preprocessing)


def describe_work(work: Work, trainer: lightning.Trainer) -> dict[str, Any]:
    """Give what is known before the training."""
    settings = work.settings
    at_once = settings.batch_size // (settings.accumulate * trainer.world_size)
    return {
        "settings": settings.plain(),
        "digest": settings.digest(),
        "classes": work.images.classes,
        "images": {part: work.task.count(work.images.targets[rows]) for part, rows in work.found.items()},
        "broken_images": work.images.broken,
        "trainable": sum(p.numel() for p in work.model.parameters() if p.requires_grad),
        "saved_bytes": saved_bytes(work.model, at_once, trained_shape(settings, work.preprocessing)),
    }


def trained_shape(settings: Settings, preprocessing: Preprocessing) -> tuple[int, ...]:
    """Give the shape of what the model is trained on: an image, or a crop of it."""
    side = settings.patch_size or preprocessing.image_size
    return (side,) * len(preprocessing.stored)


def parts_of(work: Work) -> tuple[nn.Module, dict[str, Part] | dict[str, FeaturePart]]:
    """Give what is trained and what it is fed: the model and images, or its head and their features."""
    settings, images, found = work.settings, work.images, work.found
    if settings.task == "segment":
        return work.model, masked_parts(images, found, work.preprocessing, settings)
    if settings.cache_features is None:
        parts = {}
        for part, rows in found.items():
            parts[part] = Part(images, rows, work.preprocessing, seed=settings.seed)
        parts["train"].augment = augmentation(str(settings.augment), work.preprocessing.stored)
        return work.model, parts
    everything = Part(images, np.arange(len(images)), work.preprocessing)
    features, file, there = cached_features(settings, work.model, everything)
    did = "Took" if there else "Computed"
    say(settings, f"{did} the features of {len(features)} images: {file}")
    cached = {}
    for part, rows in found.items():
        cached[part] = FeaturePart(features[rows], Part(images, rows, work.preprocessing))
    return trained_head(work.model)[1], cached


def train(work: Work, trainer: lightning.Trainer) -> Finetuning:
    """Train from the start or the last whole epoch; give the best epoch, with its outputs."""
    settings = work.settings
    network, parts = parts_of(work)
    if settings.compile:
        network.compile()
    weights = None
    if settings.class_weights:
        weights = work.task.weigh(work.images.targets[work.found["train"]])
    module = Finetuning(work.model, network, settings, work.task, weights)
    data = DataModule(parts, settings)
    folder = Path(str(settings.output)) / "checkpoints"
    last = None
    if (folder / "last.ckpt").exists():
        last = folder / "last.ckpt"
    device = trainer.strategy.root_device
    forget_peak(device)
    try:
        trainer.fit(module, data, ckpt_path=last)
    except SystemExit as error:
        # Lightning ends the process at an interrupt, and turns further ones off. Only the main thread, which
        # alone is interrupted, may turn them on again.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    module.peak = peak_memory(device)
    trainer.validate(module, data, folder / "best.ckpt", verbose=False)
    trainer.test(module, data, folder / "best.ckpt", verbose=False)
    return module


def how_it_went(module: Finetuning) -> dict[str, Any]:
    """Give the history and the cost of the training."""
    return {
        "step_seconds": median(module.step_seconds) * module.settings.accumulate,
        "peak_bytes": module.peak[0],
        "peak_memory": module.peak[1],
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
    result: dict[str, Any] = {"fitted": fitted}
    for part in ("val", "test"):
        result[part] = work.task.scores(outcome_of(module, part, fitted))
    test = outcome_of(module, "test", fitted)
    result["test"][f"{work.task.score}_interval"] = work.task.interval(test, work.settings.seed)
    if work.images.subgroups:
        subgroups = [work.images.subgroups[i] for i in work.found["test"]]
        result["test_subgroups"] = work.task.score_subgroups(test, subgroups)
    return result


def conclude(
    work: Work, trainer: lightning.Trainer, module: Finetuning, record: dict[str, Any]
) -> dict[str, Any]:
    """Print the scores and write everything that a run leaves; give the metrics as they are in their file."""
    settings, task, rows = work.settings, work.task, work.found["test"]
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
        record = write_results(settings, task, names, test, record)
        if not (settings.no_figures or settings.strategy == "fsdp2"):
            part = trainer.datamodule.parts["test"]  # type: ignore[attr-defined]  # Lightning sets it
            folder = Path(str(settings.output))
            task.show(module.network, part, test, names, folder)
    trainer.strategy.barrier()
    say(settings, f"\nSaved the adapter, the metrics and the predictions to {settings.output}")
    return record


def say(settings: Settings, text: str) -> None:
    """Print on the first process, at once, also into a pipe."""
    if not settings.quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)
