"""Run the cells that have no record yet, one after the other, and record each when it is done."""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch
import train
from trainer.errors import TrainerError
from trainer.images import Images
from trainer.preparation import images_of

import medpeft

from .cells import Cell
from .records import Record, Records

# What of a run's metrics.json a study needs; the rest stays in the run's folder.
KEPT = ("trainable", "test", "val", "best_epoch", "step_seconds", "saved_bytes", "peak_bytes", "seconds", "versions")


def run_cells(cells: Sequence[Cell], records: Records) -> list[tuple[Cell, str]]:
    """Run what has no record yet.

    Returns:
        The cells that failed, with the reason. They are tried again next time.

    Raises:
        TrainerError: a data set cannot be read.
    """
    failed: list[tuple[Cell, str]] = []
    images: dict[tuple[Any, ...], Images] = {}
    for number, cell in enumerate(cells, 1):
        # Read anew each time: another process may have finished this cell meanwhile.
        if cell.key in records.read():
            continue
        shared = _images_of(cell.args, images)
        print(f"[{number}/{len(cells)}] {cell}", end="", flush=True)
        start = time.perf_counter()
        try:
            record = run_cell(cell, shared)
        # A learning rate at which the loss is no longer a number, or a model too large, ends one run and not the study.
        except (TrainerError, medpeft.MedpeftError, torch.OutOfMemoryError) as error:
            failed.append((cell, str(error).splitlines()[0]))
            print(f": failed. {failed[-1][1]}", flush=True)
            continue
        records.append(record)
        # What resuming took is not needed any more; for full fine-tuning it is four times the model.
        (cell.args.output / "last.ckpt").unlink(missing_ok=True)
        print(f": macro-F1 {record['test']['macro_f1']:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return failed


def run_cell(cell: Cell, images: Images) -> Record:
    """Train and test one cell, from its last checkpoint if it was cut off; give its record."""
    result = train.run(argparse.Namespace(**vars(cell.args)), images)
    names = {"key": cell.key, "data": cell.data, "model": cell.model, "label": cell.label, "seed": cell.args.seed}
    kept = {name: result[name] for name in KEPT if name in result}
    val_loss = result["history"][result["best_epoch"] - 1]["val_loss"]
    return {**names, "images": result["images"], "settings": result["settings"], **kept, "val_loss": val_loss}


def _images_of(args: argparse.Namespace, cache: dict[tuple[Any, ...], Images]) -> Images:
    key = (args.data, args.image_size, args.patient_column, args.group_column, args.skip_broken)
    if key not in cache:
        cache.clear()  # Cells are in the order of their data: the one before is not needed again.
        cache[key] = images_of(args)
    return cache[key]
