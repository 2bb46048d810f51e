"""The learning rate of each row by its validation score: most of what separates untuned methods is it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from trainer.settings import Settings

from .cluster import Machines, run_all
from .page import file_name
from .summary import Record
from .trials import Row, Trial, make_trial, settings_of, write_settings

MORE = 2  # rates to try beyond the edge of a grid


@dataclass
class Lane:
    """A row while its learning rate is looked for.

    Attributes:
        row: of the table.
        rates: to try.
        trials: the runs at these rates.
    """

    row: Row
    rates: list[float]
    trials: list[Trial] = field(default_factory=list)

    def best(self) -> float | None:
        """Give the rate that validates best, None if none of the runs ended well."""
        done = [trial.record() for trial in self.trials if trial.finished()]
        return best_rate(done) if done else None

    def extend(self) -> bool:
        """Add a rate beyond the best where that is at the edge; say whether it was."""
        best = self.best()
        rate = None if best is None else beyond(self.rates, best)
        if rate is None:
            return False
        self.rates.append(rate)
        return True


def tuned(
    rows: Sequence[Row],
    common: Mapping[str, Any],
    factors: Sequence[float],
    tries: Sequence[Mapping[str, Any]],
    folder: Path,
    machines: Machines,
) -> tuple[list[Row], list[str], list[Trial]]:
    """Give the rows with the learning rates that validate best, and write their settings to files.

    Args:
        rows: of the table.
        common: settings of all of them.
        factors: of the rate that the trainer would take, to try.
        tries: on which seeds and folds, and for how many epochs.
        folder: the study's.
        machines: where.

    Returns:
        Beside the rows, why others are left out, which is that no rate worked; and all runs.
    """
    lanes = [Lane(row, multiples(settings_of(row, common).lr or 0, factors)) for row in rows]
    untried = lanes
    failed: dict[Path, str] = {}
    # The best of a grid is only known to be the best if there is a worse one on either side.
    for _ in range(1 + MORE):
        trials: list[Trial] = []
        for lane in untried:
            lane.trials = []
            for rate, attempt in product(lane.rates, tries):
                lane.trials.append(make_trial(lane.row.with_settings(lr=rate, **attempt), common, folder))
            trials += lane.trials
        failed |= run_all(trials, machines)
        untried = [lane for lane in untried if lane.extend()]
    found, missing, tried = [], [], []
    for lane in lanes:
        tried += lane.trials
        best = lane.best()
        if best is None:
            missing.append(f"{lane.trials[0]} failed: {failed[lane.trials[0].folder]}")
        else:
            found.append(lane.row.with_settings(lr=best))
            _write(settings_of(found[-1], common), lane, folder)
    return found, missing, tried


def _write(settings: Settings, lane: Lane, folder: Path) -> None:
    share = ""
    if settings.train_fraction < 1:
        share = f"-{settings.train_fraction:g}"
    place = file_name(f"{settings.model} on {lane.trials[0].data}{share}")
    write_settings(settings, folder / "settings" / place / f"{lane.row.label}.yaml")


def multiples(rate: float, factors: Sequence[float]) -> list[float]:
    """Give a rate times each factor, rounded to what one would type."""
    return sorted({_rounded(rate * factor) for factor in factors})


def beyond(rates: Sequence[float], best: float) -> float | None:
    """Give the next rate outward where the best is at an edge, None where it is inside or alone."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return _rounded(best * best / neighbour)


def best_rate(records: Sequence[Record]) -> float:
    """Give the rate of the best mean validation score; among equals, of the lowest validation loss.

    A rate that failed on a seed stands behind those that did not.
    """
    runs: dict[float, list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault(float(record.metrics["settings"]["lr"]), []).append(record.metrics)

    def worth(rate: float) -> tuple[int, float, float]:
        tried = runs[rate]
        losses = [metrics["history"][metrics["best_epoch"] - 1]["val_loss"] for metrics in tried]
        return len(tried), mean(metrics["best_val_score"] for metrics in tried), -mean(losses)

    return max(runs, key=worth)


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
