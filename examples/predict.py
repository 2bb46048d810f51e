"""Predict the class of every image in a folder, with an adapter that train.py wrote.

    python examples/predict.py runs/mine/adapter.safetensors my/images --output predictions.csv

The adapter's file says which model it belongs to, how images become its input, and how sure it may be (the temperature).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainer.errors import TrainerError
from trainer.models import build_model
from trainer.predictions import write_predictions
from trainer.preprocessing import Preprocessing
from trainer.reading import Reading, load_images
from trainer.sources import images_in

import medpeft

CHUNK = 1024  # images in memory at once


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    args = make_parser().parse_args(given)
    try:
        names, broken = run(args)
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    for text in broken:
        print(f"left out: {text}", file=sys.stderr)
    print(f"Wrote the probabilities of {len(names)} images to {args.output}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Declare the flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=Path, help="an adapter.safetensors of train.py")
    add("folder", type=Path, help="images, at any depth; or one image")
    add(
        "--output",
        type=Path,
        default=Path("predictions.csv"),
        metavar="CSV",
        help="(default: predictions.csv)",
    )
    add("--batch-size", type=int, default=32, metavar="N", help="(default: 32)")
    add("--device", help="such as cuda or cpu (default: a GPU if there is one)")
    add(
        "--skip-broken", action="store_true", help="leave out images that cannot be read, instead of stopping"
    )
    add("--quiet", action="store_true", help="show no progress")
    return parser


def run(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Write the CSV; give the images in it, and what is wrong with those left out.

    Raises:
        TrainerError, medpeft.MedpeftError: the adapter or the images do not fit.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    metadata = medpeft.inspect(args.checkpoint).metadata
    preprocessing = Preprocessing.from_metadata(metadata, args.checkpoint)
    folder, paths = (
        (args.folder.parent, [args.folder])
        if args.folder.is_file()
        else (args.folder, images_in(args.folder))
    )
    if not paths:
        raise TrainerError(f"{args.folder} has no images. Give a folder with some, at any depth.")
    model = rebuild(args.checkpoint, metadata, preprocessing).to(device)
    height, width = preprocessing.stored
    reading = Reading(height, width=width, skip_broken=args.skip_broken, quiet=args.quiet)
    names: list[str] = []
    broken: list[str] = []
    found: list[Tensor] = []
    for start in range(0, len(paths), CHUNK):
        chunk = paths[start : start + CHUNK]
        loaded = load_images(chunk, reading)
        broken += loaded.broken
        names += loaded.of([path.relative_to(folder).as_posix() for path in chunk])
        found += logits_of(model, loaded.pixels, preprocessing, args.batch_size, device)
    probabilities = torch.softmax(torch.cat(found) / metadata["temperature"], 1)
    write_predictions(args.output, names, metadata["classes"], probabilities)
    return names, broken


def rebuild(checkpoint: Path, metadata: dict[str, Any], preprocessing: Preprocessing) -> nn.Module:
    """Build the model that an adapter belongs to, and put the adapter on it."""
    # Random weights, where the run had no pretrained ones, come from its seed; `load` sees to it that they are the same.
    torch.manual_seed(metadata["seed"])
    classes = len(metadata["classes"])
    model = build_model(metadata["model"], classes, preprocessing.image_size, metadata["pretrained"])
    return medpeft.load(model, checkpoint).eval()


@torch.no_grad()
def logits_of(
    model: nn.Module, pixels: Tensor, preprocessing: Preprocessing, batch_size: int, device: torch.device
) -> list[Tensor]:
    """Give the logits (B, C) of each batch of stored pixels (N, 1 or 3, H, W)."""
    transform = preprocessing.transform()
    return [model(transform(batch).to(device)).float().cpu() for batch in pixels.split(batch_size)]


if __name__ == "__main__":
    sys.exit(main())
