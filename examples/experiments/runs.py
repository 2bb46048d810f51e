"""Run the cells that have no record yet, and record each when it is done; processes with one folder share the work."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import train
from filelock import FileLock, Timeout
from trainer.config import write_config
from trainer.errors import TrainerError
from trainer.flags import settings_of
from trainer.images import Images
from trainer.preparation import images_of

import medpeft

from .cells import Cell
from .records import Record, Records

# What of a run's metrics.json a study needs; the rest stays in the run's folder.
KEPT = (
    "trainable",
    "test",
    "val",
    "best_epoch",
    "step_seconds",
    "saved_bytes",
    "peak_bytes",
    "seconds",
    "versions",
)


def run_cells(cells: Sequence[Cell], records: Records) -> list[tuple[Cell, str]]:
    """Run what has no record yet, and wait for what another process is running.

    Returns:
        The cells that failed, with the reason. They are tried again next time.

    Raises:
        TrainerError: a data set cannot be read.
    """
    failed: list[tuple[Cell, str]] = []
    images: dict[tuple[Any, ...], Images] = {}
    left = list(enumerate(cells, 1))
    while left:
        elsewhere = []
        for number, cell in left:
            with claimed(cell, records) as ours:
                if ours is None:
                    elsewhere.append((number, cell))
                elif ours:
                    failed += _run_and_record(cell, f"[{number}/{len(cells)}] {cell}", records, images)
        left = elsewhere
        if left:
            # Its process ends it, fails, or dies: the next round sees which.
            with _lock_of(left[0][1]).acquire(poll_interval=0.5):
                pass
    return failed


@contextmanager
def claimed(cell: Cell, records: Records) -> Iterator[bool | None]:
    """Hold a run for this process alone.

    Yields:
        Whether it is to be run: not if it has a record. None while another process is at it. A process that dies lets go.
    """
    if cell.key in records.read():
        yield False
        return
    lock = _lock_of(cell)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield None
        return
    try:
        # It may have been recorded between the look and the lock.
        yield cell.key not in records.read()
    finally:
        lock.release()


def _lock_of(cell: Cell) -> FileLock:
    cell.args.output.mkdir(parents=True, exist_ok=True)
    return FileLock(cell.args.output / "run.lock")


def _run_and_record(
    cell: Cell, title: str, records: Records, images: dict[tuple[Any, ...], Images]
) -> list[tuple[Cell, str]]:
    """Run and record a cell; give it with the reason if it failed."""
    shared = _images_of(cell.args, images)
    print(title, end="", flush=True)
    start = time.perf_counter()
    try:
        record = run_cell(cell, shared)
    # A learning rate at which the loss is no longer a number, or a model too large, ends one run and not the study.
    except (TrainerError, medpeft.MedpeftError, torch.OutOfMemoryError) as error:
        reason = str(error).splitlines()[0]
        print(f": failed. {reason}", flush=True)
        return [(cell, reason)]
    records.append(record)
    # What resuming took is not needed any more; for full fine-tuning it is four times the model.
    (cell.args.output / "last.ckpt").unlink(missing_ok=True)
    print(f": macro-F1 {record['test']['macro_f1']:.3f} ({time.perf_counter() - start:.0f} s)", flush=True)
    return []


def run_cell(cell: Cell, images: Images) -> Record:
    """Train and test one cell, from its last checkpoint if it was cut off; give its record."""
    result = (
        train.run(argparse.Namespace(**vars(cell.args)), images)
        if cell.args.devices == 1
        else _run_apart(cell)
    )
    names = {
        "key": cell.key,
        "data": cell.data,
        "model": cell.model,
        "label": cell.label,
        "seed": cell.args.seed,
    }
    kept = {name: result[name] for name in KEPT if name in result}
    val_loss = result["history"][result["best_epoch"] - 1]["val_loss"]
    return {**names, "images": result["images"], "settings": result["settings"], **kept, "val_loss": val_loss}


def _run_apart(cell: Cell) -> dict[str, Any]:
    """Train and test in processes of their own; give what metrics.json holds.

    Fabric starts a process for each device by running the command again, and that must not be the study's.
    """
    settings = cell.args.output / "settings.yaml"
    write_config({k: v for k, v in settings_of(cell.args).items() if k != "config"}, settings)
    done = subprocess.run(
        [sys.executable, train.__file__, "--config", settings], stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
        raise TrainerError(
            said[0].removeprefix("train.py: ") if said else done.stderr.strip().rpartition("\n")[2]
        )
    return dict(json.loads((cell.args.output / "metrics.json").read_text()))


def _images_of(args: argparse.Namespace, cache: dict[tuple[Any, ...], Images]) -> Images:
    key = (args.data, args.image_size, args.patient_column, args.group_column, args.skip_broken)
    if key not in cache:
        cache.clear()  # Cells are in the order of their data: the one before is not needed again.
        cache[key] = images_of(args)
    return cache[key]
