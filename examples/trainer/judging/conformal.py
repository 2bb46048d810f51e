"""Conformal sets: as many classes as it takes to hold the true one in, say, 90 of 100 images.

Split conformal prediction with the least ambiguous sets (LAC; Sadinle, Lei & Wasserman 2019): a class is in
the set where its probability reaches a cutoff, a quantile of the true classes' probabilities in validation.
The promise holds on average over images, if those of validation and new ones are exchangeable. Two
things bend it: several images of one patient, and that the epoch and the temperature were chosen
on the same part. So the coverage of the test stands beside it, and is what counts.
"""

import math
from typing import Any

import numpy as np

from .quick import Flags, Floats, Whole, share

CAVEAT = "the epoch was chosen on them too, and images of one patient are not exchangeable: the test counts"


def fit_cutoff(probabilities: Floats, labels: Whole, coverage: float) -> dict[str, Any]:
    """Fit the cutoff to a validation part.

    Args:
        probabilities: (N, C).
        labels: (N,).
        coverage: the share of images whose set is to hold the true class.

    Returns:
        `coverage`; `cutoff`, the probability from which a class is in the set, 0 where N images are too few;
        `images`, N.
    """
    true = probabilities[np.arange(len(labels)), labels]
    quantile = conformal_quantile(1 - true, coverage)
    return {"coverage": coverage, "cutoff": max(0.0, 1 - quantile), "images": len(labels)}


def conformal_quantile(errors: Floats, coverage: float) -> float:
    """Give the ⌈(n + 1) · coverage⌉-th smallest of n errors, infinity where there are not as many.

    A new error, exchangeable with the n, is at most that with a probability of at least `coverage`.
    """
    # Rounded: 0.9 · 10 is 9, and in floats a little more or less.
    place = math.ceil(round((len(errors) + 1) * coverage, 9))
    if place > len(errors) or not np.isfinite(errors).all():
        return math.inf
    return float(np.sort(errors)[place - 1])


def sets_of(probabilities: Floats, cutoff: float) -> Flags:
    """Say which classes (N, C) are in each image's set; the most probable one always is."""
    # A hair below: the same image in another batch has its probability in other last digits.
    inside = np.asarray(probabilities >= cutoff - 1e-6)
    inside[np.arange(len(probabilities)), probabilities.argmax(1)] = True
    return inside


def coverage_of(inside: Flags, labels: Whole, counts: Floats) -> dict[str, Floats]:
    """Give the share of images whose set holds the true class, and the mean size, each (D,)."""
    covered = inside[np.arange(len(labels)), labels]
    total = counts.sum(1)
    return {"set_coverage": counts @ covered / total, "set_size": counts @ inside.sum(1) / total}


def score_sets(inside: Flags, labels: Whole) -> dict[str, Any]:
    """Score sets (N, C): `coverage`, `mean_size`, `sizes` (how many have 1, 2, …), `coverage_per_class`."""
    once = np.ones((1, len(labels)))
    found = coverage_of(inside, labels, once)
    covered = inside[np.arange(len(labels)), labels]
    classes = inside.shape[1]
    per_class = [float(share(covered, labels == place, once)[0]) for place in range(classes)]
    return {
        "coverage": float(found["set_coverage"][0]),
        "mean_size": float(found["set_size"][0]),
        "sizes": np.bincount(inside.sum(1), minlength=classes + 1)[1:].tolist(),
        "coverage_per_class": per_class,
    }


def describe_sets(sets: dict[str, Any], fitted: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Lay out how sets did: coverage, size, and what the promise rests on."""
    interval = ""
    if "set_coverage" in found:
        interval = " ({:.3f} to {:.3f})".format(*found["set_coverage"])
    held, promise = f"{sets['coverage']:.3f}{interval}", f"{fitted['coverage']:g}"
    lines = [f"Sets that promise {promise} hold the true class in {held}; mean size {sets['mean_size']:.2f}"]
    if fitted["cutoff"] == 0:
        fewest = math.ceil(round(fitted["coverage"] / (1 - fitted["coverage"]), 9))
        lines.append(
            f"  ({fitted['images']} validation images; below {fewest} a set has to hold all classes)"
        )
    else:
        lines.append(f"  (from {fitted['images']} validation images; {CAVEAT})")
    return lines
