"""Operating points: above which probability an image is called positive, by a rule on the validation part.

An image is positive for a class where its probability is at least the threshold. Thresholds lie halfway
between two probabilities of the validation part, so that rounding moves no image of it to the other side.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import TrainerError
from .quick import Flags, Floats, share

YOUDEN = "youden"
MEASURES = ("sensitivity", "specificity", "ppv", "npv")
SHORT = {"ppv": "PPV", "npv": "NPV"}  # positive and negative predictive value


def read_rule(text: str) -> tuple[str, float]:
    """Read a rule: `youden`, `sensitivity=0.95` or `specificity=0.9`; give its name and its number.

    Raises:
        TrainerError: it is none of them.
    """
    name, _, number = text.partition("=")
    if text == YOUDEN:
        return YOUDEN, math.nan
    try:
        least = float(number)
    except ValueError:
        least = math.nan
    if name not in ("sensitivity", "specificity") or not 0 < least <= 1:
        raise TrainerError(
            f"--threshold {text} is no rule. Take youden, sensitivity=0.95 or specificity=0.9: what the "
            "threshold must reach on the validation part."
        )
    return name, least


def fit_threshold(scores: Floats, positive: Flags, rule: str) -> float:
    """Find the threshold that a rule asks for.

    `youden` has the highest sensitivity + specificity, and of equal ones the highest sensitivity.
    `sensitivity=0.95` is the highest threshold that reaches it, so that specificity is highest;
    `specificity=0.9` the lowest.

    Args:
        scores: (N,), probabilities of the positive class.
        positive: (N,).
        rule: as of `read_rule`.

    Returns:
        NaN where nothing or everything is positive, or a score is not finite.
    """
    if positive.all() or not positive.any() or not np.isfinite(scores).all():
        return math.nan
    name, least = read_rule(rule)
    # From "all are positive" to "none is".
    thresholds = _between(np.unique(scores))
    called = scores[None, :] >= thresholds[:, None]
    sensitivity = called[:, positive].mean(1)
    specificity = (~called[:, ~positive]).mean(1)
    match name:
        case "sensitivity":
            place = int(np.flatnonzero(sensitivity >= least - 1e-12)[-1])
        case "specificity":
            place = int(np.flatnonzero(specificity >= least - 1e-12)[0])
        case _:
            place = int((sensitivity + specificity).round(12).argmax())
    return float(thresholds[place])


def measures_at(
    scores: Floats, positive: npt.ArrayLike, threshold: float, counts: Floats | None = None
) -> dict[str, Floats]:
    """Give sensitivity, specificity, PPV and NPV at a threshold, each (D,), NaN where one is undefined.

    Args:
        scores: (N,).
        positive: (N,).
        threshold: scores from it on are called positive.
        counts: (D, N), how often each image counts in each draw; None for one draw of each image once.
    """
    if counts is None:
        counts = np.ones((1, len(scores)))
    truth = np.asarray(positive, dtype=bool)
    called = scores >= threshold
    return {
        "sensitivity": share(called, truth, counts),
        "specificity": share(~called, ~truth, counts),
        "ppv": share(truth, called, counts),
        "npv": share(~truth, ~called, counts),
    }


def describe_rule(rule: str) -> str:
    """Say what a rule asks for."""
    name, least = read_rule(rule)
    if name == YOUDEN:
        return "the highest sensitivity + specificity on the validation part (Youden)"
    other = {"sensitivity": "specificity", "specificity": "sensitivity"}[name]
    return f"{name} of at least {least:g} on the validation part, at the highest {other}"


def operating_table(points: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> str:
    """Lay out operating points: the threshold, then the measures with their intervals.

    Args:
        points: by name, `threshold` and the measures.
        found: intervals by `MEASURE(NAME)`, where there are some.
    """
    rows = {}
    for name, point in points.items():
        rows[name] = {"from": f"{point['threshold']:.3f}"}
        for measure in MEASURES:
            text = f"{point[measure]:.3f}"
            if f"{measure}({name})" in found:
                text += " ({:.3f} to {:.3f})".format(*found[f"{measure}({name})"])
            rows[name][SHORT.get(measure, measure)] = text
    return str(pd.DataFrame.from_dict(rows, orient="index").to_string())


def _between(scores: Floats) -> Floats:
    """Give a threshold below each distinct score, rising, and one above all."""
    below = np.concatenate([[0.0], scores[:-1]])
    halfway = (below + scores) / 2
    above = max((scores[-1] + 1) / 2, np.nextafter(scores[-1], np.inf))
    return np.append(halfway, above)
