"""Mean ranks of the rows, and how far apart they must be.

Demšar, Statistical comparisons of classifiers over multiple data sets, JMLR 7, 2006: within each block (there
a data set, here a split of a share of one) the rows are ranked, 1 the best, of equal ones the mean;
Friedman's test asks whether the mean ranks differ at all, and by Nemenyi's two of k rows differ where their
mean ranks over N blocks are at least q √(k (k + 1) / 6N) apart (section 3.2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import friedmanchisquare, studentized_range  # type: ignore[import-untyped]

from .summary import Record

# Friedman's χ² is rough for fewer blocks; of two rows the interval says more.
FEWEST_BLOCKS, FEWEST_ROWS = 10, 3
LEVEL_OF_TEST = 0.05


@dataclass(frozen=True)
class Ranks:
    """What the ranks of rows say.

    Attributes:
        means: the mean rank by label, the best first.
        blocks: in which they were ranked.
        splits: seeds, folds and data sets that the blocks are of; shares of one split are no others.
        p: of Friedman's test, that all rows are alike.
        critical: two rows differ whose mean ranks are as far apart.
    """

    means: pd.Series
    blocks: int
    splits: int
    p: float
    critical: float

    def groups(self) -> list[tuple[float, float]]:
        """Give the longest stretches of mean ranks within which no two rows differ."""
        found: list[tuple[float, float]] = []
        values = self.means.to_numpy(dtype=float)
        for first in values:
            last = values[values < first + self.critical].max()
            if last > first and (not found or last > found[-1][1]):
                found.append((float(first), float(last)))
        return found

    def words(self) -> str:
        """Say it in words."""
        text = (
            f"Mean ranks over {self.blocks} blocks of runs, 1 the best. Friedman's test that all are alike: "
            f"p = {self.p:.2g}. Rows that a line joins do not differ by Nemenyi's test (critical difference "
            f"{self.critical:.2f})."
        )
        if self.splits < self.blocks:
            text += " Shares of one split have their test images in common, so the tests are too sure."
        return text


def rank_rows(records: Sequence[Record]) -> Ranks | None:
    """Rank the rows in every block that has all of them; None where there are too few to say anything.

    Args:
        records: of one model.
    """
    runs = []
    for record in records:
        place = (record.data, *record.split)
        runs.append((place, record.fraction, record.label, record.score))
    table = pd.DataFrame(runs, columns=["split", "fraction", "label", "score"])
    blocks = table.pivot_table(index=["split", "fraction"], columns="label", values="score").dropna()
    if blocks.shape[0] < FEWEST_BLOCKS or blocks.shape[1] < FEWEST_ROWS:
        return None
    means = blocks.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    p = friedmanchisquare(*blocks.to_numpy().T).pvalue
    splits = blocks.index.get_level_values("split").nunique()
    return Ranks(means, len(blocks), splits, float(p), critical_difference(*blocks.shape))


def critical_difference(blocks: int, rows: int) -> float:
    """Give how far apart the mean ranks of two rows must be."""
    q = studentized_range.ppf(1 - LEVEL_OF_TEST, rows, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(rows * (rows + 1) / (6 * blocks)))
