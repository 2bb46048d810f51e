"""Which places of a trained model matter? Each is switched off, one after the other, and the model scored.

    python examples/train.py --method ssf --output runs/ssf
    python examples/attribute.py runs/ssf --share 0.5

The adapters of a run are switched off place by place, and its validation images are scored without each:
places.csv and places.png in the run's folder. The last line printed is a command that trains anew with the
adapters at the best share of the places.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainer.data.batches import Batch
from trainer.errors import TrainerError
from trainer.flags import spelled
from trainer.results.card import command_of
from trainer.settings import Settings
from trainer.work import Work, parts_of, prepare

import medpeft

HELPS, DOES_NOT = "#0072B2", "#BBBBBB"


@dataclass(kw_only=True)
class Flags:
    """How to take places away.

    Attributes:
        by: whether a place is a layer, or a block of the model
        share: of the places, those to name in the command at the end
        resamples: draws of the validation images for the 95 % intervals
        device: such as cuda or cpu (default: a GPU if there is one)
    """

    by: Literal["layer", "block"] = "layer"
    share: float = 0.5
    resamples: int = 200
    device: str | None = None


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status, 2 after bad input."""
    parser = ArgumentParser(prog="attribute.py", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a finished run of train.py")
    parser.add_class_arguments(Flags)
    words = sys.argv[1:] if given is None else list(given)
    try:
        values = dict(vars(parser.parse_args(spelled(words, Flags))))
        folder = values.pop("run")
        flags = Flags(**values)
        settings = settings_of(folder)
        found = attribution_of(settings, folder, flags)
        write(found, folder)
        print(f"\nTo train with adapters at the best {flags.share:.0%} of the places:")
        print(command(settings, found.best(flags.share)))
    except (TrainerError, medpeft.MedpeftError) as error:
        print(f"attribute.py: {error}", file=sys.stderr)
        return 2
    return 0


def settings_of(folder: Path) -> Settings:
    """Read the settings of a finished run.

    Raises:
        TrainerError: there is none in the folder.
    """
    file = folder / "metrics.json"
    if not file.is_file():
        raise TrainerError(f"{folder} has no metrics.json: give the folder of a finished run of train.py.")
    written = json.loads(file.read_text(encoding="utf-8"))["settings"]
    names = {field.name for field in fields(Settings)}
    known = {name: value for name, value in written.items() if name in names}
    return Settings(**(known | {"output": folder, "quiet": True})).checked()


def attribution_of(settings: Settings, folder: Path, flags: Flags) -> medpeft.Attribution:
    """Take the places of a run's model away, one after the other, and score the validation images."""
    # Features that are kept go past the layers before them.
    work = prepare(replace(settings, cache_features=None))
    model = medpeft.load(work.model, folder / "adapter.safetensors")
    device = torch.device(flags.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    part: Any = parts_of(work)[1]["val"]
    images = DataLoader(part, settings.batch_size)
    outputs, targets = validated(work, model.to(device), images)
    kept_score = f"validation {work.task.words[work.task.score]}"
    print(f"{kept_score} {work.task.watch(outputs, targets):.4f} of {len(targets)} images", flush=True)

    def predict(network: nn.Module) -> Tensor:
        return validated(work, network, images)[0]

    def score(found: Tensor, rows: Tensor) -> float:
        return work.task.watch(found[rows], targets[rows])

    return medpeft.attribute(model, score, predict=predict, by=flags.by, resamples=flags.resamples)


@torch.no_grad()
def validated(work: Work, model: nn.Module, images: DataLoader[Batch]) -> tuple[Tensor, Tensor]:
    """Compute what is kept of outputs and targets (N, …) of the validation images."""
    device = next(model.parameters()).device
    model.eval()
    kept = []
    for inputs, targets in images:
        outputs = work.task.infer(model, inputs.to(device)).cpu()
        kept.append(work.task.keep(outputs, targets, watched=True))
    return torch.cat([outputs for outputs, _ in kept]), torch.cat([targets for _, targets in kept])


def write(found: medpeft.Attribution, folder: Path) -> None:
    """Print the places, write them as a table, and draw them."""
    print(found)
    pd.DataFrame(found.to_dict()["rows"]).to_csv(folder / "places.csv", index=False)
    draw(found, folder / "places.png")
    print(f"Wrote {folder / 'places.csv'} and {folder / 'places.png'}")


def draw(found: medpeft.Attribution, path: Path) -> None:
    """Draw what is lost without each place as a bar with its interval, the largest loss above."""
    rows = found.rows[::-1]
    figure = Figure(figsize=(7, 1.2 + 0.2 * len(rows)), dpi=150, layout="constrained")
    axes = figure.subplots()
    losses = np.array([row.loss for row in rows])
    ends = np.array([(row.low, row.high) for row in rows], dtype=float)  # (places, 2)
    colours = [HELPS if low > 0 else DOES_NOT for low, _ in ends]
    axes.barh([row.place for row in rows], losses, color=colours)
    axes.hlines(range(len(rows)), ends[:, 0], ends[:, 1], color="#333333", linewidth=0.8)
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.set_xlabel("score that is lost without the place; blue: its 95 % interval is above 0")
    axes.set_title(
        f"{found.method}: {found.score:.3f} with all places, {found.base:.3f} with none", fontsize=10
    )
    figure.savefig(path)


def command(settings: Settings, places: Sequence[str]) -> str:
    """Write the command that trains as this run did, with adapters at these places alone."""
    return command_of(replace(settings, target=list(places), output=None, quiet=False))


if __name__ == "__main__":
    sys.exit(main())
