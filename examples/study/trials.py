"""Which runs a study has: every method that fits, each once, under a name that follows its settings.

A run's folder is `runs/DIGEST` below the study's, named by what its result depends on. A run that has its
`metrics.json` there is finished and never run again; one that was cut off goes on from its last epoch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import nn
from trainer.errors import TrainerError
from trainer.networks.model import without_memory
from trainer.settings import Settings

import medpeft
from medpeft.adapters.requests import resolve

from .summary import Record


@dataclass(frozen=True)
class Row:
    """A row of the table: a method as the trainer is asked for it.

    Attributes:
        label: its name.
        settings: those in which it differs from the others.
        from_file: it is named as its file, for want of a better name.
    """

    label: str
    settings: dict[str, Any]
    from_file: bool = False

    def with_settings(self, **more: Any) -> "Row":
        """Give the row with further settings."""
        return replace(self, settings=self.settings | more)


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        label: the row of the table.
        data: the data set's name.
        settings: of the trainer.
    """

    label: str
    data: str
    settings: Settings

    @property
    def folder(self) -> Path:
        """Where the run is."""
        return Path(str(self.settings.output))

    def __str__(self) -> str:
        settings = self.settings
        fold = f", fold {settings.fold} of {settings.k_folds}" if settings.k_folds else ""
        share = f", {100 * settings.train_fraction:g} % of the images" if settings.train_fraction < 1 else ""
        where = f"{self.label} on {settings.model}, {self.data}{share}"
        return f"{where}, seed {settings.seed}{fold}, lr {settings.lr:g}"

    def finished(self) -> bool:
        """Say whether its result is there."""
        return (self.folder / "metrics.json").is_file()

    def record(self) -> Record:
        """Read its result."""
        metrics = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        predictions = pd.read_csv(self.folder / "predictions.csv", dtype=str, keep_default_na=False)
        return Record(self.label, self.settings.model, self.data, metrics, predictions)


def make_trial(row: Row, common: Mapping[str, Any], folder: Path) -> Trial:
    """Make one run out of the settings that are common to some and those of its row.

    Args:
        row: of the table; its settings win.
        common: among them `data`, `model`, `seed` and `fold`.
        folder: the study's.

    Raises:
        TrainerError: they do not go together.
    """
    # A run of Ray's has another working folder.
    settings = settings_of(row, common).absolute()
    settings = replace(settings, output=(folder / "runs" / settings.digest()).resolve())
    return Trial(row.label, name_of(settings.data), settings)


def settings_of(row: Row, common: Mapping[str, Any]) -> Settings:
    """Give the settings of a row: its own, and those that are common to several."""
    return Settings(**(dict(common) | row.settings | {"quiet": True})).checked()


def name_of(data: Any) -> str:
    """Name a data set after its file or folder."""
    return "tissue" if data is None else Path(str(data)).stem


def rows_of(methods: Sequence[str] | None, configs: Sequence[Path], given: Mapping[str, Any]) -> list[Row]:
    """List the rows that were asked for.

    Args:
        methods: names or unions; None for every registered method.
        configs: YAML files of settings with a `method` among them. A file takes the place of its method; two
            files for one method are told apart by their names. A file may also hold several rows: below
            `rows` the name and the settings of each, and beside it what all of them share.
        given: settings that win over those of a file.

    Raises:
        TrainerError: a file cannot be read or names no method, or two rows have one name.
    """
    files: list[Row] = []
    for config in configs:
        files += [row.with_settings(**given) for row in read_rows(config)]
    owners = [row.settings["method"] for row in files]
    asked = medpeft.methods() if methods is None else methods
    rows = [Row(method, {"method": method}) for method in asked if method not in owners]
    for row in files:
        method = row.settings["method"]
        alone = row.from_file and owners.count(method) == 1
        rows.append(replace(row, label=method) if alone else row)
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise TrainerError(f"Two rows are called {label}. Rename one, or its file.")
    return rows


def read_rows(config: Path) -> list[Row]:
    """Read a YAML file of settings: one row that is named as the file, or those that it names itself.

    Raises:
        TrainerError: it cannot be read, a row names no method, or has a key that is no setting.
    """
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainerError(f"--config {config} could not be read: {error}") from error
    content = content if isinstance(content, dict) else {}
    common = {name: value for name, value in content.items() if name != "rows"}
    rows = [Row(config.stem, common, from_file=True)]
    if isinstance(content.get("rows"), dict):
        rows = [Row(str(label), common | (own or {})) for label, own in content["rows"].items()]
    for row in rows:
        if not isinstance(row.settings.get("method"), str):
            raise TrainerError(
                f"--config {config} names no method for {row.label}. Add a line such as 'method: ssf'."
            )
        unknown = row.settings.keys() - vars(Settings()).keys()
        if unknown:
            raise TrainerError(
                f"--config {config} has '{min(unknown)}', which is no setting of train.py. See --help."
            )
    return rows


def fitting(rows: Sequence[Row], common: Mapping[str, Any]) -> tuple[list[Row], dict[str, str]]:
    """Keep the rows whose method fits a model, and one of those that would train the same in the same way.

    Full fine-tuning becomes two rows, with frozen and with adapting statistics, where the model has
    BatchNorms and neither the row nor the common settings say which: either may be the one that loses.

    Args:
        rows: that were asked for.
        common: settings, `model` among them.

    Returns:
        The rows to run, and for every other its label with the reason.

    Raises:
        TrainerError, medpeft.MedpeftError: there is no such model, method or option.
    """
    if not rows:
        return [], {}
    network = shapes_of(settings_of(rows[0], common))
    kept: dict[str, Row] = {}
    left_out: dict[str, str] = {}
    for row in _full_twice(rows, common, network):
        settings = settings_of(row, common)
        # An unknown name or option is a mistake on any model, and no method that happens not to fit this one.
        resolve(settings.option, {})
        try:
            plan = medpeft.plan(
                network,
                settings.option,
                target=settings.target,
                exclude=settings.exclude,
                batchnorm=settings.batchnorm,
                depth=settings.depth,
            )
        except medpeft.MedpeftError as error:
            left_out[row.label] = f"does not fit {settings.model}: {error}"
            continue
        first = kept.setdefault(_what_trains(plan, settings), row)
        if first is not row:
            left_out[row.label] = f"trains the same parameters of {settings.model} as {first.label}"
    return list(kept.values()), left_out


def shapes_of(settings: Settings) -> nn.Module:
    """Build a model without memory for its weights."""
    return without_memory(settings)[0]


def _full_twice(rows: Sequence[Row], common: Mapping[str, Any], network: nn.Module) -> list[Row]:
    given = common.get("batchnorm") is not None
    has_norms = any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules())
    result: list[Row] = []
    for row in rows:
        if row.settings == {"method": "full"} and has_norms and not given:
            result += [
                Row(f"full-{policy}", row.settings | {"batchnorm": policy}) for policy in ("frozen", "adapt")
            ]
        else:
            result.append(row)
    return result


def _what_trains(plan: medpeft.Plan, settings: Settings) -> str:
    """Name what a run would do: bias and bitfit are one method, and norm is bn where all norms are."""
    own = sorted(plan.selected)
    for module, site in plan.sites:
        own.append(f"{module.name} {site.name} {site.weight} {settings.option}")
    same = replace(settings, method="", option={}, batchnorm=None, output=None)
    return json.dumps([own, plan.record.batchnorm, str(same)])


def write_settings(settings: Settings, path: Path, searched: Iterable[str] = ("lr",)) -> None:
    """Write settings as the YAML file that `--config` of every script reads.

    Args:
        settings: checked. What is their default is left out, and so are the data, the split and the place.
        path: the file; its folder is made.
        searched: names of those that are written even so.
    """
    usual = Settings(method=settings.method).checked().plain()
    names = [name for name in usual if name in searched or getattr(settings, name) != usual[name]]
    content = {name: settings.plain()[name] for name in names if name not in ELSEWHERE}
    content["method"] = settings.method
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


ELSEWHERE = {"data", "test_data", "seed", "k_folds", "fold", "output", "quiet", "no_figures"}
