"""One run: from settings to an adapter, its scores and everything else that it leaves."""

import os
import signal
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
from torch import Tensor, nn

import medpeft

from .data import DataModule, FeaturePart, Part, Preprocessing, augmentation
from .features import cached_features, trained_head
from .images import Integers
from .lightning_trainer import make_trainer, quietly
from .models import adapted_model, check_model, input_statistics
from .module import Finetuning
from .results import (
    begin,
    count,
    describe,
    earlier,
    forget_peak,
    peak_memory,
    save_adapter,
    saved_bytes,
    write_results,
)
from .rows import Images
from .scores import fit_temperature, interval, scaled, score, score_subgroups, subgroup_table, table
from .settings import Settings
from .sources import read_data
from .splits import split


@dataclass
class Task:
    """What one run works with.

    Attributes:
        settings: checked.
        images: the data.
        found: the positions of the images in each part.
        model: adapted.
        preprocessing: from a file to the model's input.
    """

    settings: Settings
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
        say(settings, f"{settings.output} has this run already: macro-F1 {finished['test']['macro_f1']:.4f}")
        return finished
    for note in check_model(settings):
        say(settings, note)
    with quietly():
        trainer = make_trainer(settings, callbacks)
        task = prepare(settings)
        if trainer.is_global_zero:
            begin(settings)
        say(settings, describe(task.images, task.found))
        say(settings, f"\n{medpeft.report(task.model)}\n")
        record = describe_task(task, trainer)
        module = train(task, trainer)
        record |= how_it_went(module) | evaluate(task, module)
        record["seconds"] = time.perf_counter() - begun
        record["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
        return conclude(task, trainer, module, record)


def prepare(settings: Settings) -> Task:
    """Read and split the images, and adapt the model that fits them."""
    images = read_data(settings)
    found = split(images, settings)
    lightning.seed_everything(settings.seed, verbose=False)
    stored = tuple(images.pixels.shape[2:])
    model = adapted_model(settings, len(images.classes), len(stored))
    mean, std = input_statistics(model)
    return Task(settings, images, found, model, Preprocessing(stored, settings.image_size, mean, std))


def describe_task(task: Task, trainer: lightning.Trainer) -> dict[str, Any]:
    """Give what is known before the training."""
    settings = task.settings
    at_once = settings.batch_size // (settings.accumulate * trainer.world_size)
    return {
        "settings": settings.plain(),
        "digest": settings.digest(),
        "classes": task.images.classes,
        "images": {part: count(task.images, rows) for part, rows in task.found.items()},
        "broken_images": task.images.broken,
        "trainable": sum(p.numel() for p in task.model.parameters() if p.requires_grad),
        "saved_bytes": saved_bytes(task.model, at_once, task.preprocessing.input_shape),
    }


def parts_of(task: Task) -> tuple[nn.Module, dict[str, Part] | dict[str, FeaturePart]]:
    """Give what is trained and what it is fed: the model and images, or its head and their features."""
    settings, images, found = task.settings, task.images, task.found
    if settings.cache_features is None:
        parts = {}
        for part, rows in found.items():
            parts[part] = Part(images, rows, task.preprocessing, seed=settings.seed)
        parts["train"].augment = augmentation(str(settings.augment), task.preprocessing.stored)
        return task.model, parts
    everything = Part(images, np.arange(len(images)), task.preprocessing)
    features, file, there = cached_features(settings, task.model, everything)
    did = "Took" if there else "Computed"
    say(settings, f"{did} the features of {len(features)} images: {file}")
    labels = torch.from_numpy(images.labels)
    cached = {part: FeaturePart(features[rows], labels[rows]) for part, rows in found.items()}
    return trained_head(task.model)[1], cached


def train(task: Task, trainer: lightning.Trainer) -> Finetuning:
    """Train from the start or the last whole epoch; give the best epoch, with its outputs."""
    settings = task.settings
    network, parts = parts_of(task)
    if settings.compile:
        network.compile()
    weights = None
    if settings.class_weights:
        weights = class_weights(task.images, task.found["train"])
    module, data = Finetuning(task.model, network, settings, weights), DataModule(parts, settings)
    folder = Path(str(settings.output)) / "checkpoints"
    last = None
    if (folder / "last.ckpt").exists():
        last = folder / "last.ckpt"
    device = trainer.strategy.root_device
    forget_peak(device)
    try:
        trainer.fit(module, data, ckpt_path=last)
    except SystemExit as error:
        # Lightning ends the process at an interrupt, and turns further ones off.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    module.peak = peak_memory(device)
    trainer.validate(module, data, folder / "best.ckpt", verbose=False)
    trainer.test(module, data, folder / "best.ckpt", verbose=False)
    return module


def class_weights(images: Images, rows: Integers) -> Tensor:
    """Give (C,) weights by which every class has the same weight in the training loss."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return torch.tensor(len(rows) / (len(counts) * counts), dtype=torch.float32)


def how_it_went(module: Finetuning) -> dict[str, Any]:
    """Give the history and the cost of the training."""
    return {
        "step_seconds": median(module.step_seconds) * module.settings.accumulate,
        "peak_bytes": module.peak[0],
        "peak_memory": module.peak[1],
        "best_epoch": module.best_epoch,
        "best_val_macro_f1": module.history[module.best_epoch - 1]["val_macro_f1"],
        "history": module.history,
    }


def evaluate(task: Task, module: Finetuning) -> dict[str, Any]:
    """Fit the temperature on the validation part, and score that part and the test at it."""
    temperature = fit_temperature(*module.outputs["val"])
    result: dict[str, Any] = {"temperature": temperature}
    for part, (logits, truth) in module.outputs.items():
        labels = truth.cpu()
        result[part] = score(scaled(logits, temperature), labels)
        untempered = score(scaled(logits, 1), labels)["calibration_error"]
        result[part]["calibration_error_untempered"] = untempered
    logits, truth = module.outputs["test"]
    probabilities, labels = scaled(logits, temperature), truth.cpu()
    result["test"]["macro_f1_interval"] = interval(probabilities, labels, task.settings.seed)
    if task.images.subgroups:
        subgroups = [task.images.subgroups[i] for i in task.found["test"]]
        result["test_subgroups"] = score_subgroups(probabilities, labels, subgroups)
    return result


def conclude(
    task: Task, trainer: lightning.Trainer, module: Finetuning, record: dict[str, Any]
) -> dict[str, Any]:
    """Print the scores and write everything that a run leaves; give the metrics as they are in their file."""
    settings, rows = task.settings, task.found["test"]
    logits, labels = module.outputs["test"]
    probabilities = scaled(logits, record["temperature"])
    say(settings, f"\nTest on {len(rows)} images")
    say(settings, table(probabilities, labels.cpu(), task.images.classes, record["test"]))
    if "test_subgroups" in record:
        say(settings, "\n" + subgroup_table(record["test_subgroups"]))
    # What is sharded is gathered by all processes together; of equal copies one is enough.
    if settings.strategy == "fsdp2" or trainer.is_global_zero:
        save_adapter(settings, task.model, task.preprocessing, record)
    # A process that is still reading the checkpoint is waited for.
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        record = write_results(settings, task.images, rows, logits, record)
    trainer.strategy.barrier()
    say(settings, f"\nSaved the adapter, the metrics and the predictions to {settings.output}")
    return record


def say(settings: Settings, text: str) -> None:
    """Print on the first process, at once, also into a pipe."""
    if not settings.quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)
