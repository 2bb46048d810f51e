"""Settings that make no sense, or do not go together, are refused before anything is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .errors import TrainerError
from .flags import flag, read_bytes
from .judging.thresholds import read_rule

if TYPE_CHECKING:
    from .settings import Settings

TABLES = (".csv", ".tsv", ".txt")
TABLE_ONLY = (
    *("path_column", "label_column", "mask_column", "patient_column"),
    *("group_column", "finding_column"),
)
# Of them, those that a data set of Hugging Face is read by.
OF_HUGGING_FACE = ("label_column", "patient_column", "group_column")
POSITIVE = ("epochs", "patience", "repeat", "batch_size", "accumulate", "devices", "lr")
# Settings that are of use to some tasks alone.
OF_TASKS = {
    "finding_column": ("multilabel",),
    "missing": ("multilabel",),
    "uncertain": ("multilabel",),
    "grade": ("ordinal",),
    "memory": ("classify", "multilabel", "ordinal", "regress"),
    "threshold": ("classify", "multilabel"),
    "coverage": ("classify", "ordinal", "regress"),
    "mask_column": ("segment",),
    "structure": ("segment",),
    "patch_size": ("segment",),
    "class_weights": ("classify", "multilabel"),
    "balanced_sampler": ("classify", "ordinal", "segment"),
    "label_column": ("classify", "multilabel", "ordinal", "regress"),
    "masks": ("classify", "multilabel", "ordinal", "regress"),
    "cache_features": ("classify", "multilabel", "ordinal", "regress"),
}


def check_values(settings: Settings) -> None:
    """Check each number by itself."""
    for name in POSITIVE:
        if not getattr(settings, name) > 0:
            raise TrainerError(f"{flag(name)} is {getattr(settings, name)}; it must be above 0.")
    if settings.lr is not None and settings.lr > 10:
        raise TrainerError(f"--lr is {settings.lr}; a rate above 10 cannot be meant.")
    if not 0 < settings.depth <= 1:
        raise TrainerError(f"--depth is {settings.depth}; it must be above 0 and at most 1.")
    if settings.views is not None and settings.views < 1:
        raise TrainerError(f"--views is {settings.views}; it must be at least 1.")
    if settings.memory is not None:
        read_bytes(settings.memory)
    if settings.image_size < 8:
        raise TrainerError(f"--image-size is {settings.image_size}; it must be at least 8.")
    if not 0 <= settings.weight_decay < 10:
        raise TrainerError(f"--weight-decay is {settings.weight_decay}; it must be at least 0 and below 10.")
    if not 0 <= settings.warmup < 1:
        raise TrainerError(f"--warmup is {settings.warmup}; it must be at least 0 and below 1.")
    if not 0 < settings.train_fraction <= 1:
        raise TrainerError(
            f"--train-fraction is {settings.train_fraction}; it must be above 0 and at most 1."
        )
    read_rule(settings.threshold)
    if not 0 < settings.coverage < 1:
        raise TrainerError(f"--coverage is {settings.coverage}; it must be above 0 and below 1.")
    if not 0 <= settings.seed < 1_000_000:
        raise TrainerError(f"--seed is {settings.seed}; it must be from 0 to 999999.")
    if settings.num_workers < 0:
        raise TrainerError(f"--num-workers is {settings.num_workers}; it must be at least 0.")


def check_data(settings: Settings) -> None:
    """Check where the data come from and how they are split."""
    data = settings.data or ""
    for name in TABLE_ONLY:
        value = getattr(settings, name)
        if not value or data.lower().endswith(TABLES):
            continue
        if not data.startswith("hf:"):
            raise TrainerError(
                f"{flag(name)} {value} names a column, and --data {settings.data} has none. Give a .csv."
            )
        if name not in OF_HUGGING_FACE:
            raise TrainerError(
                f"{flag(name)} {value} names a column, and of --data {data} label-column, patient-column and "
                "group-column are read alone. Give a .csv."
            )
    for name in ("data", "test_data"):
        value = getattr(settings, name)
        if value and not value.startswith("hf:") and not Path(value).exists():
            raise TrainerError(
                f"{flag(name)} {value} does not exist. Give a folder, a .csv, a .npz or hf:NAME."
            )
    if settings.test_data and settings.data is None:
        raise TrainerError("--test-data needs --data: the default data have no other site.")
    test, val = settings.test_fraction, settings.val_fraction
    shares = test is not None and 0 < val < 1 and 0 <= test < 1 and val + test < 1
    if not shares or (test == 0 and not settings.test_data):
        raise TrainerError(
            f"--val-fraction {val} and --test-fraction {test} leave nothing to train on, or "
            "are not above 0. Their sum must stay below 1."
        )
    folds, fold = settings.k_folds, settings.fold
    if folds < 0 or folds == 1 or not 0 <= fold < max(folds, 1):
        raise TrainerError(f"--k-folds is {folds} and --fold {fold}; take at least 2 folds, numbered from 0.")
    if folds and settings.test_data:
        raise TrainerError("--k-folds tests on every image once, and --test-data is the test. Leave one out.")


def check_run(settings: Settings) -> None:
    """Check how it trains."""
    parts = settings.accumulate * settings.devices
    if settings.batch_size % parts:
        raise TrainerError(
            f"--batch-size {settings.batch_size} is the images of one optimizer step, and does not divide by "
            f"--accumulate {settings.accumulate} × {settings.devices} devices. Take a multiple of {parts}."
        )
    if settings.devices == 1 and settings.strategy != "auto":
        raise TrainerError(f"--strategy {settings.strategy} is for several devices. Add --devices.")
    if settings.class_weights and settings.balanced_sampler:
        raise TrainerError("--class-weights and --balanced-sampler weight rare classes twice. Leave one out.")
    cuda = torch.cuda.is_available() and settings.accelerator in ("auto", "cuda")
    if settings.precision == "16-mixed" and not cuda:
        raise TrainerError(
            "--precision 16-mixed needs a CUDA GPU: gradients are scaled there. Elsewhere take bf16-mixed."
        )
    if settings.cache_features is not None and settings.devices > 1:
        raise TrainerError("--cache-features computes the features once, on one device. Take --devices 1.")
    if settings.cache_features is not None and Path(settings.cache_features).is_file():
        raise TrainerError(f"--cache-features {settings.cache_features} is a file. Name a folder.")
    if settings.feature_dtype is not None and settings.cache_features is None:
        raise TrainerError(f"--feature-dtype {settings.feature_dtype} is for --cache-features. Add a folder.")


def check_task(settings: Settings) -> None:
    """Check that what is given is of use to the task."""
    usual = type(settings)()
    for name, tasks in OF_TASKS.items():
        if settings.task not in tasks and getattr(settings, name) != getattr(usual, name):
            raise TrainerError(
                f"{flag(name)} is for --task {' or '.join(tasks)}, and this is {settings.task}. Leave it out."
            )
    if settings.finding_column and settings.label_column:
        raise TrainerError("--finding-column takes the place of --label-column. Leave one out.")
    size = settings.patch_size
    if size is not None and not 8 <= size <= settings.image_size:
        raise TrainerError(
            f"--patch-size is {size}; it must be at least 8, and at most --image-size {settings.image_size}."
        )
    if len(set(settings.structure)) < len(settings.structure):
        raise TrainerError(f"--structure names one twice: {', '.join(settings.structure)}.")
