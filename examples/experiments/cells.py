"""A cell is one run of a study, one method on one data set with one model and split; a grid lists them all."""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from trainer.errors import TrainerError
from trainer.flags import FREE, make_parser, parse, settings_of
from trainer.models import build_model

import medpeft
from medpeft.adapters.requests import resolve

# They change where a run is, how it is fed, and what it prints, but not what comes out of it; patience does. A file's settings
# are in the other flags once they are read.
IRRELEVANT = FREE - {"patience"}


@dataclass(frozen=True)
class Choice:
    """A row of the table: a method as `train.py` is asked for it.

    Attributes:
        label: the name of the row.
        flags: of `train.py`: `("--method", "ssf")`, or `("--config", "full-frozen.yaml")`.
    """

    label: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Which images a run trains and tests on.

    Attributes:
        seed: of the split and of the training.
        folds: of a cross-validation, 0 for none.
        fold: the one to test on, from 0.
    """

    seed: int
    folds: int = 0
    fold: int = 0

    @property
    def flags(self) -> list[str]:
        """Spell it as flags of `train.py`."""
        folds = ["--k-folds", str(self.folds), "--fold", str(self.fold)] if self.folds else []
        return ["--seed", str(self.seed), *folds]

    def __str__(self) -> str:
        return f"seed {self.seed}" + (f", fold {self.fold} of {self.folds}" if self.folds else "")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        data: the data set's name.
        model: the model's name.
        label: the row of the table.
        split: of the data.
        args: what `train.run` takes.
    """

    data: str
    model: str
    label: str
    split: Split
    args: argparse.Namespace

    @property
    def key(self) -> str:
        """A digest of all settings that the result depends on."""
        return digest_of(self.args)

    def __str__(self) -> str:
        return f"{self.label} on {self.model}, {self.data}, {self.split}"


def make_cell(
    flags: Sequence[str], data: Path | None, model: str, choice: Choice, split: Split, folder: Path
) -> Cell:
    """Make one run out of the flags of `train.py` that all runs share and those of its own.

    Args:
        flags: shared ones, such as `["--epochs", "8"]`.
        data: what `--data` takes; None for the default data.
        model: a timm model.
        choice: the method.
        split: of the data.
        folder: the study's; the run writes into a folder of its own below it.
    """
    own = ["--model", model, *choice.flags, *split.flags]
    own += [] if data is None else ["--data", str(data)]
    args = parse(make_parser(""), [*flags, *own])
    args.output, args.resume = folder / "runs" / digest_of(args), True
    return Cell("tissue" if data is None else data.stem, model, choice.label, split, args)


def digest_of(args: argparse.Namespace) -> str:
    """Name a run by its settings, so that the same run has the same name in every process."""
    settings = {k: v for k, v in settings_of(args).items() if k not in IRRELEVANT}
    if args.data is not None:
        settings["data"] = str(args.data.resolve())
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_name(title: str) -> str:
    """Name files after a title such as `MODEL on DATA`: names of models may hold slashes."""
    return title.replace(" on ", "-").replace("/", "_").replace(":", "_")


def choices(methods: Sequence[str] | None, configs: Sequence[Path]) -> list[Choice]:
    """List the rows that were asked for.

    A file of settings takes the place of its method; two files for one method are told apart by their names.

    Args:
        methods: names or unions; None for every registered method.
        configs: YAML files with a `method` among their settings.

    Raises:
        TrainerError: a file cannot be read or names no method.
    """
    named = {config: method_of(config) for config in configs}
    owners = list(named.values())
    labels = {c: m if owners.count(m) == 1 else c.stem for c, m in named.items()}
    plain = list(medpeft.methods()) if methods is None else list(methods)
    rows = [Choice(m, ("--method", m)) for m in plain if m not in owners]
    rows += [Choice(labels[c], ("--config", str(c))) for c in configs]
    return sorted(rows, key=lambda row: _place(row, named, labels))


def method_of(config: Path) -> str:
    """Read which method a file of settings is for.

    Raises:
        TrainerError: it cannot be read or names none.
    """
    try:
        content = yaml.safe_load(config.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise TrainerError(f"--config {config} could not be read: {error}") from error
    if not (isinstance(content, dict) and isinstance(content.get("method"), str)):
        raise TrainerError(f"--config {config} names no method. Add a line such as 'method: ssf'.")
    return str(content["method"])


def fitting(rows: Sequence[Choice], flags: Sequence[str], model: str) -> tuple[list[Choice], dict[str, str]]:
    """Keep the rows whose method fits a model, and one of those that would train the same parameters in the same way.

    Returns:
        The rows to run, and for every other its label with the reason.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model, method or option.
    """
    parsed = {row: parse(make_parser(""), [*flags, "--model", model, *row.flags]) for row in rows}
    kept: dict[str, Choice] = {}
    left_out: dict[str, str] = {}
    network = shapes_of(model, next(iter(parsed.values())).image_size) if rows else nn.Identity()
    for row, args in parsed.items():
        # An unknown name or option is a mistake on any model, and no method that happens not to fit this one.
        resolve(args.option, {})
        try:
            plan = medpeft.plan(network, args.option, target=args.target, batchnorm=args.batchnorm)
        except medpeft.MedpeftError as error:
            left_out[row.label] = f"does not fit {model}: {error}"
            continue
        first = kept.setdefault(_what_trains(plan, args), row)
        if first is not row:
            left_out[row.label] = f"trains the same parameters of {model} as {first.label}"
    return list(kept.values()), left_out


def shapes_of(model: str, image_size: int) -> nn.Module:
    """Build a model without memory for its weights."""
    with torch.device("meta"):
        return build_model(model, 2, image_size, pretrained=False)


def _what_trains(plan: medpeft.Plan, args: argparse.Namespace) -> str:
    """Name what a run would do: bias and bitfit are one method under two names, and norm is bn where all norms are."""
    own = sorted(plan.selected) + [f"{m.name} {s.name} {s.weight} {args.option}" for m, s in plan.sites]
    rest: dict[str, Any] = {
        k: v for k, v in settings_of(args).items() if k not in {*IRRELEVANT, "method", "option"}
    }
    return json.dumps([own, plan.record.batchnorm, rest], sort_keys=True, default=str)


def _place(row: Choice, named: dict[Path, str], labels: dict[Path, str]) -> int:
    """Put a row where its method is among those of medpeft; unions come last, in the order given."""
    order = list(medpeft.methods())
    method = {labels[c]: m for c, m in named.items()}.get(row.label, row.label)
    return order.index(method) if method in order else len(order)
