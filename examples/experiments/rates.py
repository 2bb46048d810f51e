"""The learning rate of each method by the validation score: most of what separates untuned methods is their rate."""

from collections.abc import Sequence

from trainer.flags import make_parser, parse

from .cells import Choice
from .records import Record


def rate_of(flags: Sequence[str], choice: Choice) -> float:
    """Give the rate that `train.py` would take: that of the file, or the method's default."""
    return float(parse(make_parser(""), [*flags, *choice.flags]).lr)


def candidates(choice: Choice, rates: Sequence[float], epochs: int | None) -> list[Choice]:
    """Give the row once for each rate, with fewer epochs if asked for."""
    shorter = () if epochs is None else ("--epochs", str(epochs))
    return [Choice(choice.label, (*choice.flags, "--lr", repr(rate), *shorter)) for rate in rates]


def multiples(rate: float, factors: Sequence[float]) -> list[float]:
    """Give a rate times each factor, rounded to what one would type."""
    return sorted({_rounded(rate * factor) for factor in factors})


def beyond(rates: Sequence[float], best: float) -> float | None:
    """Give the next rate outward where the best is at the edge of a grid, None where it is inside or alone."""
    ordered = sorted(rates)
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    return _rounded(best * best / neighbour)


def best_rate(records: Sequence[Record]) -> float:
    """Give the rate of the run with the best validation macro-F1, and the lowest validation loss among equals."""
    best = max(records, key=lambda r: (r["val"]["macro_f1"], -r["val_loss"]))
    return float(best["settings"]["lr"])


def with_rate(choice: Choice, rate: float) -> Choice:
    """Give the row with a rate of its own."""
    return Choice(choice.label, (*choice.flags, "--lr", repr(rate)))


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
