"""The learning rate of each method by the validation score: most of what separates untuned methods is their rate."""

from collections.abc import Sequence

from trainer.flags import make_parser, parse

from .cells import Choice
from .records import Record


def rate_of(flags: Sequence[str], choice: Choice) -> float:
    """Give the rate that `train.py` would take: that of the file, or the method's default."""
    return float(parse(make_parser(""), [*flags, *choice.flags]).lr)


def candidates(choice: Choice, rate: float, factors: Sequence[float], epochs: int | None) -> list[Choice]:
    """Give the row once for each multiple of a rate, with fewer epochs if asked for."""
    shorter = () if epochs is None else ("--epochs", str(epochs))
    rates = [float(f"{rate * factor:.3g}") for factor in factors]
    return [Choice(choice.label, (*choice.flags, "--lr", repr(r), *shorter)) for r in rates]


def best_rate(records: Sequence[Record]) -> float:
    """Give the rate of the run with the best validation macro-F1, and the lowest validation loss among equals."""
    best = max(records, key=lambda r: (r["val"]["macro_f1"], -r["val_loss"]))
    return float(best["settings"]["lr"])


def with_rate(choice: Choice, rate: float) -> Choice:
    """Give the row with a rate of its own."""
    return Choice(choice.label, (*choice.flags, "--lr", repr(rate)))
