"""Predict the class of every image of a folder or a table, with an adapter that train.py wrote.

    python examples/predict.py runs/mine/adapter.safetensors my/images --output predictions.csv

The adapter's file says which model it belongs to, how images become its input, and how sure it may be (the temperature).
Where the labels are known (folders named as the classes, or a column of a table), the scores are printed too.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from trainer.data import Preprocessing
from trainer.errors import TrainerError
from trainer.flags import spelled
from trainer.images import load
from trainer.models import build_model
from trainer.results import write_predictions
from trainer.scores import score, table
from trainer.settings import Settings
from trainer.tables import rows_to_predict

import medpeft

CHUNK = 1024  # images in memory at once


@dataclass(kw_only=True)
class Flags:
    """How to predict.

    Attributes:
        output: the CSV to write
        path_column: of a table, names the image files (default: path)
        label_column: of a table, names the classes, for the scores (default: label, where there is one)
        masks: take X_mask.png beside X.png for an image too
        batch_size: images that are computed at once
        device: such as cuda or cpu (default: a GPU if there is one)
        skip_broken: leave out images that cannot be read, instead of stopping
        quiet: print nothing
    """

    output: Path = Path("predictions.csv")
    path_column: str | None = None
    label_column: str | None = None
    masks: bool = False
    batch_size: int = 32
    device: str | None = None
    skip_broken: bool = False
    quiet: bool = False


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status, 2 after bad input."""
    parser = ArgumentParser(prog="predict.py", description=__doc__)
    parser.add_argument("adapter", type=Path, help="an adapter.safetensors of train.py")
    parser.add_argument("data", help="a folder of images, at any depth; one image; or a table")
    parser.add_class_arguments(Flags)
    words = sys.argv[1:] if given is None else list(given)
    try:
        values = dict(vars(parser.parse_args(spelled(words, Flags))))
        adapter, data = values.pop("adapter"), values.pop("data")
        run(adapter, data, Flags(**values))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    return 0


def run(adapter: Path, data: str, flags: Flags) -> dict[str, Any] | None:
    """Write the CSV, and print the scores where the labels are known; give these.

    Raises:
        TrainerError, medpeft.MedpeftError: the adapter, the images or the flags do not fit.
    """
    device = checked_device(flags)
    metadata = medpeft.inspect(adapter).metadata
    preprocessing = Preprocessing.from_metadata(metadata, adapter)
    classes = metadata["classes"]
    settings = Settings(
        path_column=flags.path_column,
        label_column=flags.label_column,
        masks=flags.masks,
        volumes=metadata.get("volumes", False),
        skip_broken=flags.skip_broken,
    )
    rows = rows_to_predict(data, settings, classes)
    model = rebuild(adapter, metadata, preprocessing).to(device)
    kept: list[int] = []
    notes = list(rows.notes)
    logits: list[Tensor] = []
    for start in range(0, len(rows.items), CHUNK):
        chunk = rows.items[start : start + CHUNK]
        loaded = load(
            chunk, preprocessing.image_size, stored=preprocessing.stored, skip_broken=flags.skip_broken
        )
        notes += [f"left out: {text}" for text in loaded.broken]
        kept += [start + int(row) for row in loaded.rows]
        logits += logits_of(model, loaded.pixels, preprocessing, flags.batch_size, device)
    for note in notes:
        print(note, file=sys.stderr)
    probabilities = torch.softmax(torch.cat(logits) / metadata["temperature"], 1)
    labels = [rows.labels[i] for i in kept] if rows.labels else None
    write_predictions(flags.output, [rows.names[i] for i in kept], classes, probabilities, labels)
    scores = None
    if labels is not None:
        truth = torch.tensor([classes.index(label) for label in labels])
        scores = score(probabilities, truth)
        if not flags.quiet:
            print(table(probabilities, truth, classes, scores) + "\n")
    if not flags.quiet:
        print(f"Wrote the probabilities of {len(kept)} images to {flags.output}")
    return scores


def checked_device(flags: Flags) -> torch.device:
    """Check the flags before any work is done; give the device.

    Raises:
        TrainerError: the device cannot be had, the output not be written, or the batch is empty.
    """
    if flags.batch_size < 1:
        raise TrainerError(f"--batch-size is {flags.batch_size}; it must be at least 1.")
    if not flags.output.parent.is_dir() or flags.output.is_dir():
        raise TrainerError(f"--output {flags.output} is no file in a folder that exists.")
    name = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # Each device has its own error for not being there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise TrainerError(f"--device {name} cannot be had: {str(error).splitlines()[0]}") from error
    return device


def rebuild(adapter: Path, metadata: dict[str, Any], preprocessing: Preprocessing) -> nn.Module:
    """Build the model that an adapter belongs to, and put the adapter on it."""
    # Random weights, where the run had no pretrained ones, come from its seed; `load` sees to it that they are
    # the same.
    torch.manual_seed(metadata["seed"])
    classes, dimensions = len(metadata["classes"]), len(preprocessing.stored)
    model = build_model(
        metadata["model"], classes, preprocessing.image_size, metadata["pretrained"], dimensions
    )
    return medpeft.load(model, adapter).eval()


@torch.no_grad()
def logits_of(
    model: nn.Module, pixels: Tensor, preprocessing: Preprocessing, batch_size: int, device: torch.device
) -> list[Tensor]:
    """Give the logits (B, C) of each batch of stored pixels (N, 1 or 3, H, W), of volumes (N, 1 or 3, D, H, W)."""
    return [model(preprocessing(batch).to(device)).float().cpu() for batch in pixels.split(batch_size)]


if __name__ == "__main__":
    sys.exit(main())
