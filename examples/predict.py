"""Predict the class of every image of a folder or a table, with an adapter that train.py wrote.

    python examples/predict.py runs/mine/adapter.safetensors my/images --output predictions.csv

The adapter's file says which model it belongs to, how images become its input, how sure it may be (the
temperature), from where on a class is positive, and which classes it takes to hold the true one.
Where the labels are known (folders named as the classes, or a column of a table), the scores are printed too.
Masks are written into a folder beside the CSV, each in the geometry of its image.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from trainer.data.batches import Preprocessing
from trainer.data.rows import Rows
from trainer.data.sources import rows_to_predict
from trainer.errors import TrainerError
from trainer.files.images import Integers, load
from trainer.flags import spelled
from trainer.networks.model import build_model, segmenting
from trainer.networks.weights import load_weights
from trainer.results.folder import write_predictions
from trainer.settings import Settings
from trainer.tasks import TASKS, Outcome, Task

import medpeft

CHUNK = 1024  # images in memory at once


@dataclass(kw_only=True)
class Flags:
    """How to predict.

    Attributes:
        output: the CSV to write
        path_column: of a table, names the image files (default: path)
        label_column: of a table, names the classes, for the scores (default: label, where there is one)
        finding_column: of a table, for several findings, names one; may be repeated
        mask_column: of a table, names the files of the masks (default: mask, where there is one)
        output_masks: of a segmentation, the folder to write the masks to (default: beside the CSV)
        masks: take X_mask.png beside X.png for an image too
        weights: the file of pretrained weights that train.py was given, if it was
        batch_size: images that are computed at once
        device: such as cuda or cpu (default: a GPU if there is one)
        skip_broken: leave out images that cannot be read, instead of stopping
        quiet: print nothing
    """

    output: Path = Path("predictions.csv")
    path_column: str | None = None
    label_column: str | None = None
    finding_column: list[str] = field(default_factory=list)
    mask_column: str | None = None
    output_masks: Path | None = None
    masks: bool = False
    weights: Path | None = None
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
    task = task_of(metadata)
    settings = Settings(
        task=metadata.get("task", "classify"),
        finding_column=flags.finding_column,
        path_column=flags.path_column,
        label_column=flags.label_column,
        mask_column=flags.mask_column,
        masks=flags.masks,
        volumes=metadata.get("volumes", False),
        skip_broken=flags.skip_broken,
    )
    rows = rows_to_predict(data, settings, task.names)
    if task.labelled(rows.table):
        check_named(task, rows, data)
    model = rebuild(adapter, task, metadata, preprocessing, flags.weights).to(device)
    names, outputs, targets = predicted(task, model, rows, preprocessing, flags, device)
    scores = truths = None
    if task.labelled(rows.table):
        outcome, truths = Outcome(outputs, targets, metadata), task.truths(targets)
        scores = task.scores(outcome)
        scores["intervals"] = task.intervals(outcome, groups_of(rows, names), seed=0)
        say(flags, task.table(outcome, scores) + "\n")
    write_predictions(flags.output, names, task.predictions(outputs, metadata), truths)
    say(flags, f"Wrote the predictions for {len(names)} images to {flags.output}")
    return scores


def groups_of(rows: Rows, names: Sequence[str]) -> Integers:
    """Number the images (N,) so that those of one patient, where patients are named, have one number."""
    patients = dict(zip(rows.column("name"), rows.column("patient") or rows.column("name"), strict=True))
    _, groups = np.unique([patients[name] for name in names], return_inverse=True)
    return groups.astype(np.int64)


def check_named(task: Task, rows: Rows, data: str) -> None:
    """Raise a TrainerError for a label that the adapter does not know."""
    unknown = sorted(set(task.named(rows.table)) - set(task.names))
    if unknown:
        raise TrainerError(
            f"{data} has the label '{unknown[0]}', and the adapter the classes {', '.join(task.names)}."
        )


def task_of(metadata: Mapping[str, Any]) -> Task:
    """Make the task of an adapter; files of before there were several are of one label."""
    task = TASKS[metadata.get("task", "classify")](metadata["classes"])
    return task.informed(metadata.get("details", {}))


@torch.no_grad()
def predicted(
    task: Task,
    model: nn.Module,
    rows: Rows,
    preprocessing: Preprocessing,
    flags: Flags,
    device: torch.device,
) -> tuple[list[str], Tensor, Tensor]:
    """Give the names of the images that can be read, and what is kept of outputs and targets (N, …)."""
    found: list[tuple[Tensor, Tensor]] = []
    names: list[str] = []
    notes = list(rows.notes)
    folder = flags.output_masks or flags.output.with_name(f"{flags.output.stem}-masks")
    for start in range(0, len(rows.table), CHUNK):
        chunk = rows.table.iloc[start : start + CHUNK]
        loaded = load(
            list(chunk["item"]),
            preprocessing.image_size,
            stored=preprocessing.stored,
            skip_broken=flags.skip_broken,
        )
        chunk = chunk.iloc[loaded.rows].assign(shape=loaded.shapes)
        targets = task.read_known(chunk, preprocessing.stored)
        names += list(chunk["name"])
        notes += [f"left out: {text}" for text in loaded.broken]
        for first in range(0, len(chunk), flags.batch_size):
            batch = slice(first, first + flags.batch_size)
            images = preprocessing(loaded.pixels[batch]).to(device)
            outputs = task.infer(model, images).cpu()
            found.append(task.keep(outputs, targets[batch]))
            task.write(outputs, chunk.iloc[batch], folder)
    for note in notes:
        print(note, file=sys.stderr)
    return names, torch.cat([one for one, _ in found]), torch.cat([one for _, one in found])


def say(flags: Flags, text: str) -> None:
    """Print a text, unless nothing is to be printed."""
    if not flags.quiet:
        print(text)


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


def rebuild(
    adapter: Path,
    task: Task,
    metadata: dict[str, Any],
    preprocessing: Preprocessing,
    weights: Path | None = None,
) -> nn.Module:
    """Build the model that an adapter belongs to, and put the adapter on it.

    Raises:
        TrainerError, medpeft.MedpeftError: the weights are not those of the training, or are not given.
    """
    trained_with = metadata.get("weights")
    if trained_with and not (weights and weights.is_file()):
        raise TrainerError(
            f"{adapter} belongs to weights from the file {trained_with['file']} "
            f"(SHA-256 {trained_with['sha256'][:12]}…). Give that file with --weights."
        )
    if weights and not trained_with:
        raise TrainerError(f"{adapter} was trained without --weights. Leave it out.")
    # Random weights, where the run had no pretrained ones, come from its seed; `load` checks that they do.
    torch.manual_seed(metadata["seed"])
    dimensions = len(preprocessing.stored)
    model = build_model(
        metadata["model"],
        task.outputs,
        task.details.get("patch") or preprocessing.image_size,
        metadata["pretrained"],
        dimensions,
        metadata.get("model_option"),
    )
    if weights and trained_with:
        load_weights(model, weights, trained_with["head"])
    if metadata.get("task") == "segment":
        model, _ = segmenting(model, task.outputs)
    return medpeft.load(model, adapter).eval()


if __name__ == "__main__":
    sys.exit(main())
