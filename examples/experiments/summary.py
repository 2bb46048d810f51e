"""Records of single runs become one row for each method, model and data set."""

from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from .records import Record
from .statistics import Lead, average_ranks, bootstrap_interval, lead_of

SETTING = ["model", "data", "fraction", "label"]
OTHER_SCORES = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "mcc": "MCC",
    "ece": "Calibration error",
}


def summarise(records: Iterable[Record], *, draws: int = 2000) -> pd.DataFrame:
    """Sum up the runs that differ in nothing but their split of the data.

    Args:
        records: of finished runs.
        draws: of the bootstrap.

    Returns:
        A row for each model, data set, fraction of the training data and label, in the order of the records, with `runs`,
        `mean` and `sd` of the test macro-F1 (NaN for one run), `low` and `high` of its 95 % interval, `val`, the mean of the
        validation macro-F1, the mean of each of `OTHER_SCORES` on the test images and its deviation in `…_sd` (NaN where it is
        not defined for a run), `lr`, `trainable`, `train_images`, `saved_mib`, `peak_mib`, `step_ms`, and `seconds` of a run.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        fraction = float(record["settings"].get("train_fraction") or 1.0)
        groups.setdefault((record["model"], record["data"], fraction, record["label"]), []).append(record)
    rows = [dict(zip(SETTING, key, strict=True)) | _sum_up(runs, draws) for key, runs in groups.items()]
    return pd.DataFrame(rows)


def across_data(summary: pd.DataFrame) -> pd.DataFrame:
    """Sum up one model's rows over the data sets.

    Returns:
        Indexed by label: `average` score and average `rank`. A method that lacks a data set has no average, which would be
        one over other data than its neighbours', and its rank is over those it has.
    """
    scores = summary.pivot_table(index="label", columns="data", values="mean", sort=False)
    return pd.DataFrame({"average": scores.mean(axis=1, skipna=False), "rank": average_ranks(scores)})


def leads(summary: pd.DataFrame, baseline: str) -> dict[str, Lead]:
    """Find at which shares of the training data each method is ahead of full fine-tuning.

    Args:
        summary: rows of one model and data set.
        baseline: the label of full fine-tuning.

    Returns:
        By label, but for those that share less than two points with the baseline or are equal to it throughout.
    """
    means = summary.pivot_table(index="fraction", columns="label", values="mean", sort=False).sort_index()
    if baseline not in means:
        return {}
    found = {}
    for label in means.columns.drop(baseline):
        both = means[[label, baseline]].dropna()
        lead = lead_of(both.index, both[label], both[baseline])
        if lead is not None and len(both) > 1:
            found[str(label)] = lead
    return found


def _sum_up(runs: list[Record], draws: int) -> dict[str, Any]:
    scores = np.array([r["test"]["macro_f1"] for r in runs])
    others = {name: np.array([r["test"].get(name) for r in runs], dtype=float) for name in OTHER_SCORES}
    low, high = bootstrap_interval([r["test"]["confusion_matrix"] for r in runs], draws=draws)
    return {
        "runs": len(runs),
        "mean": scores.mean(),
        "sd": _deviation(scores),
        "low": low,
        "high": high,
        "val": np.mean([r["val"]["macro_f1"] for r in runs]),
        **{name: values.mean() for name, values in others.items()},
        **{f"{name}_sd": _deviation(values) for name, values in others.items()},
        "lr": median(r["settings"]["lr"] for r in runs),
        "trainable": runs[0]["trainable"],
        "train_images": round(np.mean([sum(r["images"]["train"].values()) for r in runs])),
        "saved_mib": _middle(runs, "saved_bytes", 2**-20),
        "peak_mib": _middle(runs, "peak_bytes", 2**-20),
        "step_ms": _middle(runs, "step_seconds", 1000),
        "seconds": _middle(runs, "seconds", 1),
    }


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _middle(runs: list[Record], name: str, scale: float) -> float:
    # The median: one step during a cold start or beside another process does not move it.
    found = [r[name] * scale for r in runs if r.get(name) is not None]
    return median(found) if found else float("nan")
