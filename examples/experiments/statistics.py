"""What many runs say together: mean and spread over seeds, intervals by bootstrap, the average rank."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]


def macro_f1(confusion: npt.ArrayLike) -> Floats:
    """Average the F1 of the classes that occur, among the true labels or the predictions.

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


def bootstrap_interval(
    confusions: Sequence[npt.ArrayLike], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Give the percentile interval of the mean macro-F1 of several runs.

    Each draw takes as many runs as there are, with replacement, and for each of them as many test predictions as it has,
    with replacement: so the interval holds the chance in the seed and that in the test images. Drawing predictions is
    drawing from their confusion matrix (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).

    Args:
        confusions: a (C, C) matrix of counts for each run.
        level: the share of the draws inside the interval.
        draws: how many.
        seed: the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    matrices = np.stack([np.asarray(c, dtype=np.int64) for c in confusions])
    runs, classes = matrices.shape[0], matrices.shape[1]
    scores = np.empty((draws, runs))
    for column in range(runs):
        for run, where in _by_run(rng.integers(runs, size=draws)):
            flat = matrices[run].ravel()
            drawn = rng.multinomial(flat.sum(), flat / flat.sum(), size=len(where))
            scores[where, column] = macro_f1(drawn.reshape(-1, classes, classes))
    low, high = np.quantile(scores.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def average_ranks(scores: pd.DataFrame) -> pd.Series:
    """Rank the methods (rows) in every setting (columns), 1 the best, and average; equal scores share their mean rank.

    A setting that lacks a method counts for the others alone.
    """
    return scores.rank(ascending=False, method="average").mean(axis=1)


def pareto_front(cost: npt.ArrayLike, score: npt.ArrayLike) -> list[int]:
    """Give the positions that no other beats, costing no more and scoring no less, in the order of their cost."""
    costs, scores = np.asarray(cost, dtype=np.float64), np.asarray(score, dtype=np.float64)
    best, front = -np.inf, []
    for i in np.lexsort((-scores, costs)):
        if scores[i] > best:
            best = scores[i]
            front.append(int(i))
    return front


@dataclass(frozen=True)
class Lead:
    """Where a method is ahead of full fine-tuning.

    Attributes:
        ahead: whether it is with the least data.
        crossings: the amounts of data, increasing, at each of which the one that was behind takes the lead.
    """

    ahead: bool
    crossings: tuple[float, ...] = ()


def lead_of(x: npt.ArrayLike, ours: npt.ArrayLike, baseline: npt.ArrayLike) -> Lead | None:
    """Find where the curves of a method and of full fine-tuning cross, interpolated on a logarithmic axis.

    Args:
        x: (N,) increasing amounts of data, above 0.
        ours: (N,) the scores of a method.
        baseline: (N,) those of full fine-tuning.

    Returns:
        None where the scores are equal throughout.
    """
    lead = np.asarray(ours, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    apart = np.flatnonzero(lead)
    if not len(apart):
        return None
    logs = np.log(np.asarray(x, dtype=np.float64))
    # From each point to the next at which another leads; equal scores between them are the crossing itself.
    last = [i for i, j in pairwise(apart) if (lead[i] > 0) != (lead[j] > 0)]
    shares = [lead[i] / (lead[i] - lead[i + 1]) for i in last]
    crossings = (logs[i] + share * (logs[i + 1] - logs[i]) for i, share in zip(last, shares, strict=True))
    return Lead(bool(lead[apart[0]] > 0), tuple(float(np.exp(at)) for at in crossings))


def _by_run(drawn: npt.NDArray[np.int64]) -> list[tuple[int, npt.NDArray[np.int64]]]:
    return [(int(run), np.flatnonzero(drawn == run)) for run in np.unique(drawn)]
