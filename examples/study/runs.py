"""Every run of a study in a line of a table: what it was, what came of it, and with which versions."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .summary import Record

VERSIONS = ("medpeft", "torch", "timm", "python")
SETTINGS = ("lr", "epochs", "repeat", "batch_size", "image_size", "batchnorm")


def write_runs(parts: Mapping[str, Sequence[Record]], folder: Path) -> None:
    """Write `runs.csv`: with settings, scores, times, versions and what names the predictions.

    Args:
        parts: by what they were for, to choose a rate or to test, the finished runs.
        folder: the study's.
    """
    lines = []
    for part, records in parts.items():
        lines += [{"for": part, **line_of(record)} for record in records]
    pd.DataFrame(lines).to_csv(folder / "runs.csv", index=False)


def line_of(record: Record) -> dict[str, Any]:
    """Give the line of a run."""
    metrics, settings = record.metrics, record.metrics["settings"]
    seed, fold = record.split
    line: dict[str, Any] = {"model": record.model, "data": record.data, "row": record.label}
    line |= {"share": record.fraction, "seed": seed, "fold": fold}
    line |= {"method": settings.get("method"), "depth": record.depth, "options": record.options}
    line |= {name: settings.get(name) for name in SETTINGS}
    line |= {"best_epoch": metrics.get("best_epoch"), "val": metrics["best_val_score"]}
    line |= {name: metrics["test"].get(name) for name in record.task.words}
    line["calibration_error_untempered"] = metrics["test"].get("calibration_error_untempered")
    line |= {"worst_recall": record.worst_recall, "predictions": digest_of(record.predictions)}
    line |= {"trainable": metrics["trainable"], "saved_bytes": metrics.get("saved_bytes")}
    line |= {"step_seconds": metrics.get("step_seconds"), "seconds": metrics.get("seconds")}
    line |= {name: metrics.get("versions", {}).get(name) for name in VERSIONS}
    return line | {"date": metrics.get("date"), "run": metrics.get("digest")}


def digest_of(predictions: pd.DataFrame) -> str:
    """Name what a run said of each image: two runs with one digest have one score.

    Of classes it is of what was predicted alone: the last digits of probabilities differ between machines.
    """
    said = predictions
    if "prediction" in predictions:
        said = predictions[["path", "prediction"]]
    return hashlib.sha256(said.to_csv(index=False).encode()).hexdigest()[:12]
