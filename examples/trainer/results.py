"""What a run leaves: the adapter, its settings and scores, every prediction, and the figures."""

import argparse
import json
from typing import Any

import numpy as np
import torch

import medpeft

from .config import write_config
from .figure import draw_training
from .images import Images, Integers
from .metrics import without_nan
from .predictions import write_predictions
from .preparation import Run
from .split import PARTS, divided_groups


def save_adapter(args: argparse.Namespace, run: Run, record: dict[str, Any]) -> None:
    """Write the adapter with what it takes to use it; called on every process where the model is sharded."""
    metadata = {
        "model": args.model,
        "pretrained": not args.no_pretrained,
        "seed": args.seed,
        "classes": record["classes"],
        "preprocessing": run.preprocessing.to_metadata(),
        "temperature": record["temperature"],
        "test_macro_f1": record["test"]["macro_f1"],
    }
    medpeft.save(run.model, args.output / "adapter.safetensors", metadata=metadata)


def write_results(args: argparse.Namespace, images: Images, record: dict[str, Any]) -> None:
    """Write the settings, the metrics, the predictions and the figure to `--output`."""
    kept = {key: value for key, value in record.items() if key != "test_predictions"}
    text = json.dumps(without_nan(kept), indent=2, allow_nan=False)
    (args.output / "metrics.json").write_text(text + "\n")
    write_config({k: v for k, v in record["settings"].items() if k != "config"}, args.output / "config.yaml")
    found = record["test_predictions"]
    names = [images.names[i] if images.names else str(i) for i in found["index"]]
    labels = [images.classes[label] for label in found["label"]]
    probabilities = torch.tensor(found["probabilities"])
    write_predictions(args.output / "predictions.csv", names, images.classes, probabilities, labels)
    if args.no_figures:
        return
    draw_training(
        record["history"],
        record["best_epoch"],
        record["test"]["confusion_matrix"],
        record["classes"],
        f"{args.method} on {args.model}: test macro-F1 {record['test']['macro_f1']:.3f}",
        args.output / "training.png",
    )


def count(images: Images, rows: Integers) -> dict[str, int]:
    """Count the images of each class among some rows."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return dict(zip(images.classes, counts.tolist(), strict=True))


def describe(images: Images, found: dict[str, Integers]) -> str:
    """Lay out how many images of each class are in each part."""
    width = max(len(name) for name in [*images.classes, "images"])
    lines = [f"{'images':<{width}}" + "".join(f"{part:>8}" for part in PARTS)]
    counts = {part: count(images, rows) for part, rows in found.items()}
    lines += [
        f"{name:<{width}}" + "".join(f"{counts[part][name]:>8}" for part in PARTS) for name in images.classes
    ]
    if images.broken:
        lines.append(
            f"Left out, as they cannot be read: {len(images.broken)} images, the first: {images.broken[0]}"
        )
    if divided := divided_groups(images, found):
        lines.append(
            f"Warning: {divided} groups (exact copies, or one patient's images) fall into more "
            "than one part of the split that the data bring, so its scores flatter the model."
        )
    return "\n".join(lines)
