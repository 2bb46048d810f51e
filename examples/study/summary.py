"""What many runs say together: mean, spread and interval of a row, its difference from full fine-tuning.

Chance is drawn twice, by the bootstrap (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters
8 and 13): as many runs as there are, with replacement, and for each of them as many test images as it has,
with replacement. A difference is drawn from the images that both rows were tested on, so that images which
are hard for both do not count as chance.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

OTHER_SCORES = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "mcc": "MCC",
    "calibration_error": "Calibration error",
}
# By column, what metrics.json calls it, and the factor.
COSTS = {
    "saved_mib": ("saved_bytes", 2**-20),
    "peak_mib": ("peak_bytes", 2**-20),
    "step_ms": ("step_seconds", 1000.0),
    "seconds": ("seconds", 1.0),
}
BETTER, ALIKE, WORSE = "better", "cannot be told apart", "worse"


@dataclass(frozen=True)
class Record:
    """A finished run.

    Attributes:
        label: the row of the table.
        model: the model's name.
        data: the data set's name.
        metrics: what the run wrote to metrics.json.
        predictions: what it wrote to predictions.csv; of its columns `label` and `prediction` are used.
    """

    label: str
    model: str
    data: str
    metrics: dict[str, Any]
    predictions: pd.DataFrame

    @property
    def split(self) -> tuple[int, int]:
        """Seed and fold: runs of one data set that have them in common were tested on the same images."""
        settings = self.metrics["settings"]
        return int(settings["seed"]), int(settings.get("fold") or 0)

    @property
    def fraction(self) -> float:
        """Share of the training images that the run used."""
        return float(self.metrics["settings"].get("train_fraction") or 1.0)


def summarise(records: Iterable[Record], baseline: str | None = None, *, draws: int = 2000) -> pd.DataFrame:
    """Sum up the runs that differ in nothing but their split of the data.

    Args:
        records: of finished runs.
        baseline: the label to compare the others with; None for the row of full fine-tuning (or, where there
            is none, of all rows) that has the best mean validation score.
        draws: of the bootstrap.

    Returns:
        A row for each model, data set, share of the training images and label, the best first in each of
        these, with `runs`, `mean` and `sd` of the test macro-F1 (NaN for one run), `low` and `high` of its 95
        % interval, the mean `val` of the validation macro-F1, each of `OTHER_SCORES` and its deviation in
        `…_sd`, the costs, and against the `baseline`: `difference`, `difference_low`, `difference_high` and
        in a word the `verdict`.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    labels: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record.model, record.data, record.fraction, record.label), []).append(record)
        labels.setdefault((record.model, record.data), []).append(record)
    rows = []
    for (model, data, fraction, label), group in groups.items():
        against = choose_baseline(labels[model, data], baseline)
        row = {"model": model, "data": data, "fraction": fraction, "label": label, **_sum_up(group, draws)}
        reference = groups.get((model, data, fraction, against), [])
        rows.append(
            {**row, "baseline": against, **compare(group, reference if label != against else [], draws)}
        )
    table = pd.DataFrame(rows)
    place = table.groupby(["model", "data"], sort=False).ngroup()
    table = table.assign(place=place).sort_values(
        ["place", "fraction", "mean"], ascending=[True, True, False]
    )
    return table.drop(columns="place").reset_index(drop=True)


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
    """Say whether a row is full fine-tuning: `full`, `full-frozen`, `full-adapt`."""
    return label.split("-")[0] == "full"


def compare(ours: Sequence[Record], reference: Sequence[Record], draws: int) -> dict[str, Any]:
    """Give the mean difference of the macro-F1 on the splits of both rows, its interval and the verdict."""
    other = {record.split: record for record in reference}
    pairs = [(record, other[record.split]) for record in ours if record.split in other]
    names = ("difference", "difference_low", "difference_high", "verdict")
    if not pairs:
        return dict(zip(names, (np.nan, np.nan, np.nan, ""), strict=True))
    scores = draw_scores([side_by_side(pair) for pair in pairs], draws)
    low, high = np.quantile(scores[:, 0] - scores[:, 1], [0.025, 0.975])
    verdict = ALIKE
    if low > 0:
        verdict = BETTER
    elif high < 0:
        verdict = WORSE
    total = 0.0
    for own, theirs in pairs:
        total += own.metrics["test"]["macro_f1"] - theirs.metrics["test"]["macro_f1"]
    return dict(zip(names, (total / len(pairs), float(low), float(high), verdict), strict=True))


def side_by_side(records: Sequence[Record]) -> pd.DataFrame:
    """Lay out the labels of the images that all of some runs were tested on, and each run's predictions."""
    tables = [record.predictions.drop_duplicates("path").set_index("path") for record in records]
    columns = {"label": tables[0]["label"]}
    for place, table in enumerate(tables):
        columns[str(place)] = table["prediction"]
    return pd.concat(columns, axis=1, join="inner")


def draw_scores(runs: Sequence[pd.DataFrame], draws: int = 2000, seed: int = 0) -> Floats:
    """Draw runs, and for each the test images, with replacement; give the mean macro-F1 of every draw.

    Args:
        runs: for each a row an image, with its `label` and one or more columns of predictions.
        draws: how many.
        seed: the same seed gives the same draws.

    Returns:
        (draws, columns of predictions).
    """
    rng = np.random.default_rng(seed)
    names = np.unique(pd.concat(runs).to_numpy(dtype=str))
    tables = [_count(run, names) for run in runs]
    total = np.zeros((draws, runs[0].shape[1] - 1))
    for _ in runs:
        picked = rng.integers(len(runs), size=draws)
        for number, (cells, counts) in enumerate(tables):
            where = np.flatnonzero(picked == number)
            drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(where))
            for column in range(total.shape[1]):
                confusion = drawn @ _indicator(cells[:, 0], cells[:, column + 1], len(names))
                # (draws, C·C) → (draws, C, C)
                total[where, column] += macro_f1(confusion.reshape(-1, len(names), len(names)))
    return total / len(runs)


def macro_f1(confusion: npt.ArrayLike) -> Floats:
    """Average the F1 of the classes that occur, among the true labels or the predictions.

    scikit-learn and torchmetrics take one matrix at a time, and an interval takes thousands.

    Args:
        confusion: (..., C, C) counts, rows true and columns predicted.

    Returns:
        (...), NaN where there are no counts at all.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    either = counts.sum(-1) + counts.sum(-2)
    f1 = np.divide(2 * hits, either, out=np.zeros_like(hits), where=either > 0)
    occurring = (either > 0).sum(-1)
    mean: Floats = np.divide(f1.sum(-1), occurring, out=np.full(occurring.shape, np.nan), where=occurring > 0)
    return mean


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
    known = rows[rows["verdict"].isin([BETTER, WORSE])].sort_values("fraction")
    for (_, before), (_, after) in zip(known.iloc[:-1].iterrows(), known.iloc[1:].iterrows(), strict=True):
        if before["verdict"] != after["verdict"]:
            found.append((float(before["fraction"]), float(after["fraction"]), after["verdict"] == BETTER))
    return found


def _count(
    run: pd.DataFrame, names: npt.NDArray[np.str_]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Give the distinct rows of a run as class numbers (U, columns), and how often each occurs (U,)."""
    numbers = np.searchsorted(names, run.to_numpy(dtype=str))
    cells, counts = np.unique(numbers, axis=0, return_counts=True)
    return cells, counts


def _indicator(label: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], classes: int) -> Floats:
    """Mark for each distinct row its cell of the confusion matrix: (U,), (U,) → (U, C·C)."""
    table = np.zeros((len(label), classes * classes))
    table[np.arange(len(label)), label * classes + predicted] = 1
    return table


def _sum_up(group: list[Record], draws: int) -> dict[str, Any]:
    runs = pd.json_normalize([record.metrics for record in group])
    numbers = ["test.macro_f1", "best_val_score", "settings.lr", "trainable"]
    numbers += [f"test.{name}" for name in OTHER_SCORES] + [key for key, _ in COSTS.values()]
    # What a run has not, such as an AUROC where a class is missing, is NaN.
    runs = runs.assign(**runs.reindex(columns=numbers).astype(float))
    row: dict[str, Any] = {"runs": len(runs)}
    row["mean"], row["sd"] = _spread(runs["test.macro_f1"])
    scores = draw_scores([side_by_side([record]) for record in group], draws)
    row["low"], row["high"] = np.quantile(scores, [0.025, 0.975])
    row["val"] = runs["best_val_score"].mean()
    for name in OTHER_SCORES:
        row[name], row[f"{name}_sd"] = _spread(runs[f"test.{name}"])
    row["lr"], row["trainable"] = runs["settings.lr"].median(), int(runs["trainable"].iloc[0])
    row["train_images"] = round(runs.filter(regex=r"^images\.train\.").sum(axis=1).mean())
    # The median: one step during a cold start or beside another process does not move it.
    for name, (key, factor) in COSTS.items():
        row[name] = factor * runs[key].median()
    return row


def _spread(values: pd.Series) -> tuple[float, float]:
    """Give mean and standard deviation; NaN where one is not defined or there is only one."""
    return float(values.mean(skipna=False)), float(values.std(skipna=False))
