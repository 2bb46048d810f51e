"""A study is what was asked for and what came of it: its runs, those that failed, and what was left out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from .cells import Cell
from .records import Record, Records
from .runs import run_cells


@dataclass
class Study:
    """What was asked for, and what came of it.

    Attributes:
        args: the study's flags.
        shared: the flags for every run.
        records: the finished runs.
        failed: the runs that ended in an error, with it.
        left_out: the methods that are not run, with the reason.
    """

    args: argparse.Namespace
    shared: list[str]
    records: Records
    failed: list[tuple[Cell, str]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace, shared: list[str]) -> Study:
        """Begin with the records that are in the study's folder already."""
        index, count = args.shard
        return cls(args, shared, Records(args.output, "" if count == 1 else f"-{index}"))


def in_order(args: argparse.Namespace, cells: Sequence[Cell]) -> list[Cell]:
    """Put the data sets outermost, so that each is read once, and leave the rest as it is."""
    place = {data: i for i, data in enumerate(args.data)}
    return sorted(cells, key=lambda cell: place[cell.args.data])


def finished(study: Study, cells: Sequence[Cell]) -> list[Record]:
    """Run what is missing of this machine's share; give the records of all cells that have one."""
    index, count = study.args.shard
    study.failed += run_cells(cells[index - 1 :: count], study.records)
    found = study.records.read()
    # A record may come from a row or a study that called it otherwise.
    return [found[cell.key] | {"label": cell.label, "data": cell.data} for cell in cells if cell.key in found]


def about(done: list[Record], expected: int) -> str:
    """Say in one line how the numbers came about."""
    first = done[0]
    seeds = sorted({record["seed"] for record in done})
    versions = ", ".join(f"{name} {version}" for name, version in first.get("versions", {}).items())
    settings = first["settings"]
    folds = f", each with {settings['k_folds']} folds" if settings.get("k_folds") else ""
    return (
        f"{len(done)} of {expected} runs; seeds {', '.join(map(str, seeds))}{folds}; at most {settings['epochs']} epochs, "
        f"batches of {settings['batch_size']}, {settings['image_size']} pixels; {versions}."
    )


def missing(study: Study) -> list[str]:
    """Say what was not run, or failed, and why."""
    lines = [f"{label}: {reason}" for label, reason in study.left_out.items()]
    return lines + [f"{cell} failed: {reason}" for cell, reason in study.failed]
