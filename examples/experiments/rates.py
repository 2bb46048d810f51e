"""The learning rate of each row by its validation score: most of what separates untuned methods is their rate."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from trainer.errors import TrainerError
from trainer.flags import make_parser, parse

from .cells import Cell, Choice, Split, file_name, make_cell
from .records import Record
from .runs import run_cells
from .settings import write_settings
from .study import Study, in_order

MORE = 2  # rates to try beyond the edge of a grid


def declare_rate_flags(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the search for the rates."""
    add = parser.add_argument
    add(
        "--lr-factors",
        nargs="+",
        type=float,
        metavar="X",
        help="try each method's learning rate times each X",
    )
    add("--lr-epochs", type=int, metavar="N", help="epochs of those trials (default: those of the runs)")
    add(
        "--lr-seeds",
        type=int,
        default=1,
        metavar="N",
        help="judge a rate by its mean over the first N seeds (default: 1)",
    )


def check_rate_flags(args: argparse.Namespace) -> None:
    """Raise a TrainerError for flags that do not go together."""
    if args.shard[1] > 1 and args.lr_factors:
        raise TrainerError(
            "--shard cannot be combined with --lr-factors: every machine would try every rate. On machines that share "
            "--output, start the same command on each without --shard; otherwise find the rates on one, then give "
            f"{args.output / 'settings'}/…/*.yaml to --config."
        )
    if not 1 <= args.lr_seeds <= len(args.seed):
        raise TrainerError(
            f"--lr-seeds is {args.lr_seeds}; it must be from 1 to {len(args.seed)}, the number of seeds."
        )


@dataclass(frozen=True)
class Row:
    """A method on one data set with one model, which has a learning rate of its own.

    Attributes:
        data: what `--data` takes; None for the default data.
        model: a timm model.
        choice: the method.
    """

    data: Path | None
    model: str
    choice: Choice

    def cell(self, study: Study, split: Split) -> Cell:
        """Give its run on one split of the data."""
        return make_cell(study.shared, self.data, self.model, self.choice, split, study.args.output)

    def at(self, rate: float, epochs: int | None = None) -> Row:
        """Give the row with a rate, and another number of epochs if asked for."""
        shorter = () if epochs is None else ("--epochs", str(epochs))
        return replace(
            self, choice=Choice(self.choice.label, (*self.choice.flags, "--lr", repr(rate), *shorter))
        )


def tuned(study: Study, rows: Sequence[Row]) -> list[Row]:
    """Give the rows with the learning rates of their best validation scores, and write each one's settings to a file.

    All rates of all rows are tried before any best one is looked at, so that processes which share the work seldom wait.
    A row for which no rate works is left out, and its runs are among the study's failed ones.
    """
    args = study.args
    grids = {row: multiples(rate_of(study.shared, row.choice), args.lr_factors) for row in rows}
    best = try_rates(study, grids)
    # The best of a grid is only known to be the best if there is a worse one on either side.
    for _ in range(MORE):
        further = {row: rate for row in best if (rate := beyond(grids[row], best[row])) is not None}
        for row, rate in further.items():
            grids[row].append(rate)
        best |= try_rates(study, {row: grids[row] for row in further})
    found = [row.at(rate) for row, rate in best.items()]
    for row in found:
        cell = row.cell(study, args.splits[0])
        share = "" if cell.args.train_fraction == 1 else f"-{cell.args.train_fraction:g}"
        folder = args.output / "settings" / (file_name(f"{row.model} on {cell.data}") + share)
        write_settings(cell.args, folder / f"{cell.label}.yaml")
    return found


def try_rates(study: Study, grids: Mapping[Row, Sequence[float]]) -> dict[Row, float]:
    """Run every row with every rate of its grid, on the seeds for that; give the best rate of each row that has one.

    Of a cross-validation the first fold is enough.
    """
    args = study.args
    splits = [split for split in args.splits if split.fold == 0][: args.lr_seeds]
    trials = {
        row: [row.at(r, args.lr_epochs).cell(study, s) for r in rates for s in splits]
        for row, rates in grids.items()
    }
    failed = run_cells(in_order(args, [cell for cells in trials.values() for cell in cells]), study.records)
    found = study.records.read()
    best = {}
    for row, cells in trials.items():
        if done := [found[cell.key] for cell in cells if cell.key in found]:
            best[row] = best_rate(done)
        else:
            keys = {cell.key for cell in cells}
            study.failed += [(cell, reason) for cell, reason in failed if cell.key in keys]
    return best


def rate_of(flags: Sequence[str], choice: Choice) -> float:
    """Give the rate that `train.py` would take: that of the file, or the method's default."""
    return float(parse(make_parser(""), [*flags, *choice.flags]).lr)


def multiples(rate: float, factors: Sequence[float]) -> list[float]:
    """Give a rate times each factor, rounded to what one would type."""
    return sorted({_rounded(rate * factor) for factor in factors})


def beyond(rates: Sequence[float], best: float) -> float | None:
    """Give the next rate outward where the best is at the edge of a grid, None where it is inside or alone."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return _rounded(best * best / neighbour)


def best_rate(records: Sequence[Record]) -> float:
    """Give the rate of the best mean validation macro-F1 over the seeds, and the lowest validation loss among equals.

    A rate that failed on a seed stands behind those that did not.
    """
    runs: dict[float, list[Record]] = {}
    for record in records:
        runs.setdefault(float(record["settings"]["lr"]), []).append(record)

    def worth(rate: float) -> tuple[int, float, float]:
        tried = runs[rate]
        return len(tried), mean(r["val"]["macro_f1"] for r in tried), -mean(r["val_loss"] for r in tried)

    return max(runs, key=worth)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
