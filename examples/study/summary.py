"""What many runs say together: mean, spread and interval of a row, its difference from full fine-tuning.

Intervals are drawn (`bootstrap.py`). A difference is drawn from the images that both rows were tested on, so
that images which are hard for both do not count as chance. What is said of it follows from its interval and
from a margin that is fixed before: within it a difference is none that matters.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from trainer.tasks import TASKS, Task

from .bootstrap import draw_scores

# By column, what metrics.json calls it, and the factor.
COSTS = {
    "saved_mib": ("saved_bytes", 2**-20),
    "peak_mib": ("peak_bytes", 2**-20),
    "step_ms": ("step_seconds", 1000.0),
    "seconds": ("seconds", 1.0),
}
AHEAD, LEVEL, BEHIND, UNCLEAR = "ahead", "level", "behind", "cannot tell"
MARGIN = 0.02  # of the score
# Of classes: what the task's words do not name.
FURTHER = {
    "worst_recall": "recall of the worst class",
    "calibration_error_untempered": "calibration error before the temperature",
}


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        label: the row of the table.
        model: the model's name.
        data: the data set's name.
        metrics: what the run wrote to metrics.json.
        predictions: what it wrote to predictions.csv, as text.
    """

    label: str
    model: str
    data: str
    metrics: dict[str, Any]
    predictions: pd.DataFrame

    @property
    def task(self) -> type[Task]:
        """What was asked of the images."""
        return TASKS[self.metrics["settings"].get("task") or "classify"]

    @property
    def score(self) -> float:
        """The score of the test by which methods are compared."""
        return float(self.metrics["test"][self.task.score])

    @property
    def options(self) -> str:
        """In which options the method differs from its default, and whether features are kept."""
        words = []
        for own in self.metrics["settings"].get("option", {}).values():
            words += [f"{name}={value}" for name, value in own.items()]
        if self.metrics["settings"].get("cache_features"):
            words.append("features kept")
        return ", ".join(words)

    @property
    def depth(self) -> float:
        """Share of the blocks that are adapted."""
        return float(self.metrics["settings"].get("depth") or 1.0)

    @property
    def worst_recall(self) -> float:
        """Recall of the class with the lowest, NaN where there are no classes."""
        known = [recall for recall in self.metrics["test"].get("recall_per_class", []) if recall is not None]
        return min(known, default=np.nan)

    @property
    def split(self) -> tuple[int, int]:
        """Seed and fold: runs of one data set that have them in common were tested on the same images."""
        settings = self.metrics["settings"]
        return int(settings["seed"]), int(settings.get("fold") or 0)

    @property
    def fraction(self) -> float:
        """Share of the training images that the run used."""
        return float(self.metrics["settings"].get("train_fraction") or 1.0)


def summarise(
    records: Iterable[Record], baseline: str | None = None, margin: float = MARGIN, *, draws: int = 2000
) -> pd.DataFrame:
    """Sum up the runs that differ in nothing but their split of the data.

    Args:
        records: of finished runs.
        baseline: the label to compare the others with; None for the row of full fine-tuning (or, where there
            is none, of all rows) that has the best mean validation score.
        margin: a difference within it is none that matters.
        draws: of the bootstrap.

    Returns:
        A row for each model, data set, share of the training images and label, the best first in each of
        these, with its `task`, `runs`, `mean` and `sd` of the test score (NaN for one run), `low` and `high`
        of its 95 % interval, the mean `val` of the validation score, each other score of the task and its
        deviation in `…_sd`, the `depth` and `options`, the costs, and against the `baseline`: `difference`,
        `difference_low`, `difference_high` and in a word the `verdict`.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    labels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.model, record.data, record.fraction, record.label), []).append(record)
        labels.setdefault((record.model, record.data), []).append(record)
    rows = []
    for (model, data, fraction, label), group in groups.items():
        against = choose_baseline(labels[model, data], baseline)
        row = {"model": model, "data": data, "fraction": fraction, "label": label}
        row |= {"task": group[0].metrics["settings"].get("task") or "classify", **_sum_up(group, draws)}
        row |= {"baseline": against, "margin": margin}
        reference = groups.get((model, data, fraction, against), [])
        if label == against:
            reference = []
        rows.append(row | compare(group, reference, margin, draws))
    table = pd.DataFrame(rows)
    place = table.groupby(["model", "data"], sort=False).ngroup()
    table = table.assign(place=place).sort_values(
        ["place", "fraction", "mean"], ascending=[True, True, False]
    )
    return table.drop(columns="place").reset_index(drop=True)


def other_scores(task: type[Task]) -> dict[str, str]:
    """Give the scores of a task beside the one by which methods are compared, with what they are called."""
    return {name: words for name, words in task.words.items() if name != task.score}


def choose_baseline(records: Sequence[Record], wanted: str | None) -> str:
    """Name the row to compare with: the one asked for, or the full fine-tuning that validates best."""
    scores: dict[str, list[float]] = {}
    for record in records:
        scores.setdefault(record.label, []).append(record.metrics["best_val_score"])
    if wanted in scores:
        return wanted
    candidates = [label for label in scores if is_full(label)] or list(scores)
    return max(candidates, key=lambda label: float(np.mean(scores[label])))


def is_full(label: str) -> bool:
    """Say whether a row is full fine-tuning of the whole model."""
    return label in ("full", "full-frozen", "full-adapt")


def verdict_of(low: float, high: float, margin: float) -> str:
    """Say what the interval of a difference from the baseline bears.

    Args:
        low: where it begins.
        high: where it ends.
        margin: within ±margin a difference is none that matters.

    Returns:
        `level`: the interval lies within ±margin, whether it holds 0 or not. `ahead`, `behind`: it lies
        above, below 0, and reaches beyond the margin. `cannot tell`: it holds 0 and reaches beyond the
        margin.
    """
    if -margin < low and high < margin:
        return LEVEL
    if low > 0:
        return AHEAD
    if high < 0:
        return BEHIND
    return UNCLEAR


def compare(ours: Sequence[Record], reference: Sequence[Record], margin: float, draws: int) -> dict[str, Any]:
    """Give the mean difference of the scores on the splits of both rows, its interval and the verdict."""
    other = {record.split: record for record in reference}
    pairs = [(record, other[record.split]) for record in ours if record.split in other]
    names = ("difference", "difference_low", "difference_high", "verdict")
    if not pairs:
        return dict(zip(names, (np.nan, np.nan, np.nan, ""), strict=True))
    scores = draw_scores([side_by_side(pair) for pair in pairs], ours[0].task.score, draws)
    low, high = np.quantile(scores[:, 0] - scores[:, 1], [0.025, 0.975])
    verdict = verdict_of(low, high, margin)
    total = 0.0
    for own, theirs in pairs:
        total += own.score - theirs.score
    return dict(zip(names, (total / len(pairs), float(low), float(high), verdict), strict=True))


def side_by_side(records: Sequence[Record]) -> list[pd.DataFrame]:
    """Give the predictions of some runs for the images that all of them were tested on, in one order."""
    tables = [record.predictions.drop_duplicates("path").set_index("path") for record in records]
    shared = tables[0].index
    for table in tables[1:]:
        shared = shared[shared.isin(table.index)]
    return [table.loc[shared] for table in tables]


def across_data(summary: pd.DataFrame) -> pd.DataFrame:
    """Sum up one model's rows over the data sets.

    Returns:
        Indexed by label: `average` score and average `rank`, 1 the best, of equal scores the mean. A method
        that lacks a data set has no average, which would be one over other data than its neighbours', and its
        rank is over those it has.
    """
    scores = summary.pivot_table(index="label", columns="data", values="mean", sort=False)
    ranks = scores.rank(ascending=False, method="average").mean(axis=1)
    return pd.DataFrame({"average": scores.mean(axis=1, skipna=False), "rank": ranks})


def pareto_front(cost: npt.ArrayLike, score: npt.ArrayLike) -> list[int]:
    """Give the positions that no other beats, costing no more and scoring no less, by their cost."""
    costs, scores = np.asarray(cost, dtype=np.float64), np.asarray(score, dtype=np.float64)
    best, front = -np.inf, []
    for i in np.lexsort((-scores, costs)):
        if scores[i] > best:
            best = scores[i]
            front.append(int(i))
    return front


def crossings(rows: pd.DataFrame) -> list[tuple[float, float, bool]]:
    """Find where a method overtakes the baseline or falls behind, as far as the intervals tell.

    Args:
        rows: of one label, with `fraction` and `verdict`.

    Returns:
        For each crossing the last share at which the one was ahead, the first at which the other is, and
        whether it is the method that is ahead from there on. What lies between the two could not be told
        apart.
    """
    found = []
    known = rows[rows["verdict"].isin([AHEAD, BEHIND])].sort_values("fraction")
    for (_, before), (_, after) in zip(known.iloc[:-1].iterrows(), known.iloc[1:].iterrows(), strict=True):
        if before["verdict"] != after["verdict"]:
            found.append((float(before["fraction"]), float(after["fraction"]), after["verdict"] == AHEAD))
    return found


def _sum_up(group: list[Record], draws: int) -> dict[str, Any]:
    task = group[0].task
    runs = pd.json_normalize([record.metrics for record in group])
    numbers = ["best_val_score", "settings.lr", "trainable"]
    numbers += [f"test.{name}" for name in [*task.words, "calibration_error_untempered"]]
    numbers += [key for key, _ in COSTS.values()]
    # What a run has not, such as an AUROC where a class is missing, is NaN.
    runs = runs.assign(**runs.reindex(columns=numbers).astype(float))
    row: dict[str, Any] = {"runs": len(runs)}
    row["mean"], row["sd"] = _spread(runs[f"test.{task.score}"])
    scores = draw_scores([side_by_side([record]) for record in group], task.score, draws)
    row["low"], row["high"] = np.quantile(scores, [0.025, 0.975])
    row["val"] = runs["best_val_score"].mean()
    for name in other_scores(task):
        row[name], row[f"{name}_sd"] = _spread(runs[f"test.{name}"])
    row["worst_recall"], row["worst_recall_sd"] = _spread(pd.Series([own.worst_recall for own in group]))
    untempered = "calibration_error_untempered"
    row[untempered], row[f"{untempered}_sd"] = _spread(runs[f"test.{untempered}"])
    row["depth"], row["options"] = group[0].depth, group[0].options
    row["lr"], row["trainable"] = runs["settings.lr"].median(), int(runs["trainable"].iloc[0])
    row["train_images"] = round(runs.filter(regex=r"^images\.train\.").sum(axis=1).mean())
    # The median: one step during a cold start or beside another process does not move it.
    for name, (key, factor) in COSTS.items():
        row[name] = factor * runs[key].median()
    return row


def _spread(values: pd.Series) -> tuple[float, float]:
    """Give mean and standard deviation; NaN where one is not defined or there is only one."""
    return float(values.mean(skipna=False)), float(values.std(skipna=False))
