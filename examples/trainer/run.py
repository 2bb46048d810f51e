"""One run: from settings to an adapter, its scores and everything else that it leaves."""

import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import lightning
import numpy as np
import timm
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

import medpeft

from .data import DataModule, FeaturePart, Part, Preprocessing
from .errors import TrainerError
from .features import cached_features, trained_head
from .images import Integers
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
from .splits import split
from .tables import read_data

BEST, LAST = "best.ckpt", "last.ckpt"


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
    check_model(settings)
    with _quietly():
        trainer = make_trainer(settings, callbacks)
        images = read_data(settings)
        found = split(images, settings)
        if trainer.is_global_zero:
            begin(settings)
        say(settings, describe(images, found))
        model, preprocessing = model_for(settings, images)
        say(settings, f"\n{medpeft.report(model)}\n")
        record = {
            "settings": settings.plain(),
            "digest": settings.digest(),
            "classes": images.classes,
            "images": {part: count(images, rows) for part, rows in found.items()},
            "broken_images": images.broken,
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "saved_bytes": saved_bytes(model, images_at_once(settings, trainer), preprocessing.input_shape),
        }
        module = train(settings, trainer, model, images, found, preprocessing)
        record |= how_it_went(module) | evaluate(settings, images, found, module)
        record["seconds"] = time.perf_counter() - begun
        record["versions"] = {"torch": torch.__version__, "timm": timm.__version__}
        return conclude(settings, trainer, module, images, found, preprocessing, record)


def model_for(settings: Settings, images: Images) -> tuple[nn.Module, Preprocessing]:
    """Build and adapt the model that fits the images, and say how they become its input."""
    lightning.seed_everything(settings.seed, verbose=False)
    stored = tuple(images.pixels.shape[2:])
    model = adapted_model(settings, len(images.classes), len(stored))
    mean, std = input_statistics(model)
    return model, Preprocessing(stored, settings.image_size, mean, std)


def parts_of(
    settings: Settings,
    model: nn.Module,
    images: Images,
    found: dict[str, Integers],
    preprocessing: Preprocessing,
) -> tuple[nn.Module, dict[str, Part] | dict[str, FeaturePart]]:
    """Give what is trained and what it is fed: the model and images, or its head and the features before it."""
    if settings.cache_features is None:
        parts = {}
        for part, rows in found.items():
            strength = str(settings.augment) if part == "train" else "none"
            parts[part] = Part(images, rows, preprocessing, strength, settings.seed)
        return model, parts
    everything = Part(images, np.arange(len(images)), preprocessing)
    features, file, there = cached_features(settings, model, everything)
    say(settings, f"{'Took' if there else 'Computed'} the features of {len(features)} images: {file}")
    labels = torch.from_numpy(images.labels)
    cached = {part: FeaturePart(features[rows], labels[rows]) for part, rows in found.items()}
    return trained_head(model)[1], cached


def make_trainer(settings: Settings, callbacks: Sequence[lightning.Callback] = ()) -> lightning.Trainer:
    """Make Lightning's `Trainer`.

    Raises:
        TrainerError: the devices cannot be had.
    """
    folder = Path(str(settings.output))
    strategy: Any = settings.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(
            data_parallel_size=settings.devices, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    checkpoints = folder / "checkpoints"
    best = ModelCheckpoint(
        checkpoints, "best", monitor="val_macro_f1", mode="max", enable_version_counter=False
    )
    last = ModelCheckpoint(checkpoints, "last", enable_version_counter=False)
    stop = EarlyStopping("val_macro_f1", mode="max", patience=settings.patience, check_finite=False)
    try:
        return lightning.Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=strategy,
            precision=settings.precision,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            callbacks=[stop, best, last, *callbacks],
            logger=loggers(settings),
            default_root_dir=folder,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        raise TrainerError(
            f"--accelerator {settings.accelerator} --devices {settings.devices} cannot be had: {error}"
        ) from error


def loggers(settings: Settings) -> list[Logger]:
    """Make the loggers: a CSV always, others by name.

    Raises:
        TrainerError: the package of one is not installed.
    """
    folder = Path(str(settings.output))
    found: list[Logger] = [CSVLogger(folder, "logs")]
    for name in settings.logger:
        try:
            match name:
                case "tensorboard":
                    found.append(TensorBoardLogger(folder, "tensorboard"))
                case "wandb":
                    found.append(WandbLogger(folder.name, folder, project="medpeft"))
                case "mlflow":
                    found.append(MLFlowLogger("medpeft", folder.name, save_dir=str(folder / "mlruns")))
        except ImportError as error:
            raise TrainerError(f"--logger {name} needs its package: pip install {name}. ({error})") from error
    return found


def train(
    settings: Settings,
    trainer: lightning.Trainer,
    model: nn.Module,
    images: Images,
    found: dict[str, Integers],
    preprocessing: Preprocessing,
) -> Finetuning:
    """Train from the start or the last whole epoch; give the best epoch, with its outputs on validation and test."""
    network, parts = parts_of(settings, model, images, found, preprocessing)
    if settings.compile:
        network.compile()
    weights = class_weights(images, found["train"]) if settings.class_weights else None
    module = Finetuning(model, network, settings, weights)
    data = DataModule(parts, settings)
    folder = Path(str(settings.output)) / "checkpoints"
    last = folder / LAST if (folder / LAST).exists() else None
    device = trainer.strategy.root_device
    forget_peak(device)
    try:
        trainer.fit(module, data, ckpt_path=last)
    except SystemExit as error:
        # Lightning ends the process at an interrupt, and turns further ones off.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from error
    module.peak = peak_memory(device)
    trainer.validate(module, data, folder / BEST, verbose=False)
    trainer.test(module, data, folder / BEST, verbose=False)
    return module


def images_at_once(settings: Settings, trainer: lightning.Trainer) -> int:
    """Count the images that one process computes at a time."""
    return settings.batch_size // (settings.accumulate * trainer.world_size)


def class_weights(images: Images, rows: Integers) -> Tensor:
    """Give (C,) weights by which every class has the same weight in the training loss."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return torch.tensor(len(rows) / (len(counts) * counts), dtype=torch.float32)


def how_it_went(module: Finetuning) -> dict[str, Any]:
    """Give the history and the cost of the training."""
    seconds = module.step_seconds
    return {
        "step_seconds": median(seconds) * module.settings.accumulate if seconds else None,
        "peak_bytes": module.peak[0],
        "peak_memory": module.peak[1],
        "best_epoch": module.best_epoch,
        "best_val_macro_f1": module.history[module.best_epoch - 1]["val_macro_f1"],
        "history": module.history,
    }


def evaluate(
    settings: Settings, images: Images, found: dict[str, Integers], module: Finetuning
) -> dict[str, Any]:
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
    result["test"]["macro_f1_interval"] = interval(probabilities, labels, settings.seed)
    if images.subgroups is not None:
        subgroups = [images.subgroups[i] for i in found["test"]]
        result["test_subgroups"] = score_subgroups(probabilities, labels, subgroups)
    return result


def conclude(
    settings: Settings,
    trainer: lightning.Trainer,
    module: Finetuning,
    images: Images,
    found: dict[str, Integers],
    preprocessing: Preprocessing,
    record: dict[str, Any],
) -> dict[str, Any]:
    """Print the scores and write everything that a run leaves; give the metrics as they are in their file."""
    logits, labels = module.outputs["test"]
    probabilities = scaled(logits, record["temperature"])
    test, rows = record["test"], found["test"]
    say(settings, f"\nTest on {len(rows)} images")
    say(settings, table(probabilities, labels.cpu(), images.classes, test))
    if "test_subgroups" in record:
        say(settings, "\n" + subgroup_table(record["test_subgroups"]))
    # What is sharded is gathered by all processes together; of equal copies one is enough.
    if settings.strategy == "fsdp2" or trainer.is_global_zero:
        save_adapter(settings, module.whole[0], preprocessing, record)
    # A process that is still reading the checkpoint is waited for.
    trainer.strategy.barrier()
    if trainer.is_global_zero:
        record = write_results(settings, images, rows, logits, record)
    trainer.strategy.barrier()
    say(settings, f"\nSaved the adapter, the metrics and the predictions to {settings.output}")
    return record


def say(settings: Settings, text: str) -> None:
    """Print on the first process, at once, also into a pipe."""
    if not settings.quiet and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, flush=True)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep Lightning's advice about workers and folders out of the output; errors stay."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = [logging.getLogger(name).level for name in names]
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for name, level in zip(names, levels, strict=True):
            logging.getLogger(name).setLevel(level)
