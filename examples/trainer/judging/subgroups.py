"""Gaps between subgroups of patients: which one fares worst, by how much, and whether that may be chance."""

import math
from collections.abc import Mapping
from typing import Any

FEW = 20  # images below which a subgroup's score says little


def gaps(found: Mapping[str, Mapping[str, Any]], words: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Give for each score the gap between the subgroups with the highest and the lowest.

    Args:
        found: scores by subgroup, NaN where one is not defined.
        words: the scores to compare.

    Returns:
        By score `gap`, `highest` and `lowest`; nothing for one that fewer than two subgroups have.
    """
    result = {}
    for name in words:
        values = {}
        for group, scores in found.items():
            if math.isfinite(scores[name]):
                values[group] = scores[name]
        if len(values) > 1:
            highest, lowest = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
            result[name] = {"gap": values[highest] - values[lowest], "highest": highest, "lowest": lowest}
    return result


def describe_worst(found: Mapping[str, Mapping[str, Any]], score: str, words: Mapping[str, str]) -> str:
    """Name the subgroup with the lowest score, "" where there are not two to compare."""
    gap = gaps(found, words).get(score)
    if gap is None:
        return ""
    worst, best = gap["lowest"], gap["highest"]
    text = (
        f"The worst subgroup is '{worst}': {words[score]} {found[worst][score]:.3f} on "
        f"{found[worst]['images']} images, {gap['gap']:.3f} below '{best}'."
    )
    intervals = [found[name].get("intervals", {}).get(score) for name in (worst, best)]
    if all(intervals) and intervals[0][1] >= intervals[1][0]:
        text += " Their 95 % intervals overlap: this may be chance."
    if found[worst]["images"] < FEW:
        text += f" Fewer than {FEW} images say little."
    return text
