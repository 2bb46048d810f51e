"""Chance, drawn twice: which runs there were, and which test images each of them had.

The bootstrap of Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13: as many runs
as there are, with replacement, and for each of them as many test images as it has, with replacement. A drawn
set of images is a weight for each, how often it was drawn, and every score here is computed from weights:
scikit-learn and torchmetrics score one set at a time, and an interval takes thousands.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
from trainer.judging.quick import Floats, auroc, confusion_of, macro_f1

AT_ONCE = 250  # draws, for which the weights of all images lie in memory


def draw_scores(
    runs: Sequence[Sequence[pd.DataFrame]], score: str = "macro_f1", draws: int = 2000, seed: int = 0
) -> Floats:
    """Draw runs, and for each the test images, with replacement; give the mean score of every draw.

    Args:
        runs: for each one or more predictions.csv, of rows that are compared, about the same images in one
            order.
        score: a key of `SCORES`.
        draws: how many.
        seed: the same seed gives the same draws.

    Returns:
        (draws, tables of a run).
    """
    rng = np.random.default_rng(seed)
    grouped = [group_alike(tables, score) for tables in runs]
    total = np.zeros((draws, len(runs[0])))
    for _ in runs:
        picked = rng.integers(len(runs), size=draws)
        for number, (tables, counts) in enumerate(grouped):
            rows = np.flatnonzero(picked == number)
            for part in np.array_split(rows, max(1, -(-len(rows) // AT_ONCE))):
                drawn = rng.multinomial(counts.sum(), counts / counts.sum(), size=len(part))
                for column, table in enumerate(tables):
                    total[part, column] += SCORES[score](table, drawn.astype(np.float64))
    return total / len(runs)


def group_alike(
    tables: Sequence[pd.DataFrame], score: str
) -> tuple[list[pd.DataFrame], npt.NDArray[np.int64]]:
    """Join images about which all tables say the same; give the tables of the rest, and how many each is."""
    columns = columns_of(tables[0], score)
    joined = pd.concat([table[columns].reset_index(drop=True) for table in tables], axis=1)
    joined.columns = pd.RangeIndex(joined.shape[1])
    counts = joined.groupby(list(joined.columns), sort=False).size()
    cells = counts.index.to_frame(index=False)
    parts = []
    for place in range(len(tables)):
        own = cells.iloc[:, place * len(columns) : (place + 1) * len(columns)]
        parts.append(own.set_axis(columns, axis=1))
    return parts, counts.to_numpy()


def columns_of(table: pd.DataFrame, score: str) -> list[str]:
    """Name the columns that a score is computed from."""
    match score:
        case "auroc":
            return [name for name in table if name.startswith(("label(", "p("))]
        case "dice":
            return [name for name in table if name.startswith("dice(")]
        case "macro_f1" | "kappa" | "r2":
            return ["label", "prediction"]
        case _:
            raise KeyError(f"columns_of does not say what {score} is computed from")


def weighted_macro_f1(table: pd.DataFrame, weights: Floats) -> Floats:
    """Average the F1 of the classes; (draws, N) → (draws,)."""
    names = np.unique(table.to_numpy(dtype=str))
    return macro_f1(confusion_by_name(table, names, weights))


def weighted_kappa(table: pd.DataFrame, weights: Floats) -> Floats:
    """Compute Cohen's kappa with quadratic weights, of grades that are numbers; (draws, N) → (draws,)."""
    names = np.array(sorted(np.unique(table.to_numpy(dtype=str)), key=float))
    confusion = confusion_by_name(table, names, weights)
    places = np.arange(len(names))
    cost = (places[:, None] - places) ** 2
    # What chance would give with the same shares: (draws, C, 1) times (draws, 1, C)
    chance = confusion.sum(2)[:, :, None] * confusion.sum(1)[:, None, :]
    expected = (chance * cost).sum((1, 2)) / confusion.sum((1, 2))
    observed = (confusion * cost).sum((1, 2))
    agreement: Floats = 1 - np.divide(observed, expected, out=np.ones_like(observed), where=expected > 0)
    return agreement


def weighted_determination(table: pd.DataFrame, weights: Floats) -> Floats:
    """Compute R²; (draws, N) → (draws,)."""
    truth, predicted = numbers(table["label"]), numbers(table["prediction"])
    mean = weights @ truth / weights.sum(1)
    residual = weights @ (truth - predicted) ** 2
    # Σ w (t − m)² = Σ w t² − (Σ w) m²
    spread = weights @ truth**2 - weights.sum(1) * mean**2
    share: Floats = np.divide(
        spread - residual, spread, out=np.full_like(spread, np.nan), where=spread > 1e-12
    )
    return share


def weighted_auroc(table: pd.DataFrame, weights: Floats) -> Floats:
    """Average the area under the ROC curve of the findings that have one; (draws, N) → (draws,)."""
    areas = []
    for column in table:
        if str(column).startswith("label("):
            name = str(column).removeprefix("label(").removesuffix(")")
            truth, scores = numbers(table[column]), numbers(table[f"p({name})"])
            known = ~np.isnan(truth)
            areas.append(auroc(scores[known], truth[known] == 1, weights[:, known]))
    stacked = np.stack(areas)
    defined = ~np.isnan(stacked)
    sums, counts = np.where(defined, stacked, 0).sum(0), defined.sum(0)
    mean: Floats = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return mean


def weighted_dice(table: pd.DataFrame, weights: Floats) -> Floats:
    """Average the Dice of every structure over the images that have it, then the structures' means."""
    means = []
    for column in table:
        values = numbers(table[column])
        known = ~np.isnan(values)
        total = weights[:, known].sum(1)
        sums = weights[:, known] @ values[known]
        means.append(np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0))
    found: Floats = np.nanmean(np.stack(means), axis=0)
    return found


SCORES: dict[str, Callable[[pd.DataFrame, Floats], Floats]] = {
    "macro_f1": weighted_macro_f1,
    "kappa": weighted_kappa,
    "r2": weighted_determination,
    "auroc": weighted_auroc,
    "dice": weighted_dice,
}


def confusion_by_name(table: pd.DataFrame, names: npt.NDArray[np.str_], weights: Floats) -> Floats:
    """Count weights by true class (rows) and predicted class (columns): (draws, N) → (draws, C, C)."""
    order = {name: place for place, name in enumerate(names)}
    true = table["label"].astype(str).map(order).to_numpy()
    predicted = table["prediction"].astype(str).map(order).to_numpy()
    return confusion_of(predicted, true, len(names), weights)


def numbers(column: pd.Series) -> Floats:
    """Read a column of text as numbers, NaN where a cell is empty."""
    values: Floats = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    return values
