"""A model card: what a run knows about its model, and what only its user can say, marked as such."""

import platform
import shlex
from collections.abc import Mapping
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

import medpeft

from ..flags import flag
from ..judging.conformal import describe_sets
from ..judging.resampling import describe_draws
from ..judging.subgroups import describe_worst
from ..judging.thresholds import MEASURES, SHORT, describe_rule
from ..settings import Settings
from ..tasks import Task
from .claim import ITEMS, answers, open_items

PACKAGES = ("torch", "timm", "lightning", "monai", "torchmetrics", "scikit-learn", "numpy")
TO_FILL_IN = "**To be filled in by the user.**"
PER_CLASS = {
    "recall_per_class": "recall (sensitivity)",
    "specificity_per_class": "specificity",
    "precision_per_class": "precision (PPV)",
    "auroc_per_class": "AUROC",
}
ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=False,  # Markdown
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


def versions() -> dict[str, str]:
    """Give the versions of Python, medpeft and what a run stands on."""
    found = {"python": platform.python_version(), "medpeft": medpeft.__version__}
    for name in PACKAGES:
        found[name] = version(name)
    return found


def write_card(settings: Settings, task: Task, record: Mapping[str, Any]) -> None:
    """Write model-card.md into the run's folder."""
    answered = answers(settings, record)
    text = ENVIRONMENT.get_template("model-card.md").render(
        settings=settings,
        task=task,
        record=record,
        test=record["test"],
        fitted=record["fitted"],
        command=command_of(settings),
        images=images_table(record),
        classes=class_table(task, record["test"]),
        subgroups=subgroup_table(task, record),
        worst=describe_worst(record.get("test_subgroups", {}), task.score, task.words),
        answered=answered,
        items=ITEMS,
        still_open=open_items(answered),
        describe_draws=describe_draws,
        describe_rule=describe_rule,
        describe_sets=describe_sets,
        measures=MEASURES,
        short=SHORT,
        interval=interval,
        to_fill_in=TO_FILL_IN,
    )
    path = Path(str(settings.output)) / "model-card.md"
    path.write_text(text, encoding="utf-8")


def command_of(settings: Settings) -> str:
    """Write the command that gives this run again: what differs from the defaults."""
    usual, words = Settings(), ["python", "examples/train.py"]
    for own in fields(Settings):
        value = getattr(settings, own.name)
        if own.name == "option":
            for method, options in value.items():
                for name, one in options.items():
                    words += ["--option", f"{method}.{name}={one}"]
        elif value == getattr(usual, own.name) or value is None:
            continue
        elif value is True:
            words.append(flag(own.name))
        elif isinstance(value, list):
            for one in value:
                words += [flag(own.name), str(one)]
        else:
            words += [flag(own.name), str(value)]
    return shlex.join(words)


def interval(found: Mapping[str, Any], name: str) -> str:
    """Write an interval, "–" where there is none."""
    low, high = found.get(name, (None, None))
    if low is None or low != low:
        return "–"
    return f"{low:.3f} to {high:.3f}"


def images_table(record: Mapping[str, Any]) -> str:
    """Lay out how many images and groups are in each part."""
    table = pd.DataFrame(record["images"]).astype("Int64")
    sizes = pd.DataFrame(record["parts"])
    return markdown(pd.concat([table, sizes.rename(index={"images": "all images"})]))


def class_table(task: Task, test: Mapping[str, Any]) -> str:
    """Lay out the scores of each class, "" where the task has no classes."""
    if "recall_per_class" not in test:
        return ""
    columns = {}
    for key, words in PER_CLASS.items():
        if key in test:
            columns[words] = test[key]
    return markdown(pd.DataFrame(columns, index=task.names))


def subgroup_table(task: Task, record: Mapping[str, Any]) -> str:
    """Lay out the scores of subgroups, with the interval of the first; "" where there are none."""
    found = record.get("test_subgroups", {})
    if not found:
        return ""
    table = pd.DataFrame.from_dict(found, orient="index")[["images", *task.words]]
    intervals = [interval(scores["intervals"], task.score) for scores in found.values()]
    table.insert(2, "95 % interval", intervals)
    return markdown(table.rename(columns=task.words))


def markdown(table: pd.DataFrame) -> str:
    """Write a table as Markdown, numbers with three decimals."""
    lines = ["| | " + " | ".join(map(str, table.columns)) + " |", "|---|" + "--:|" * len(table.columns)]
    for name, row in table.astype(object).iterrows():
        cells = [str(name).replace("|", " "), *map(_cell, row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value)
