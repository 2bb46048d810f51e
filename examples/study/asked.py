"""What a command line asks for: rows on models, data sets and shares, and where their rates are tried."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace
from trainer.errors import TrainerError

from .trials import Row, fitting, rows_of, settings_of


def tries_of(args: Namespace) -> list[dict[str, Any]]:
    """Say on which splits, and for how many epochs, learning rates are tried."""
    tries: list[dict[str, Any]] = []
    for seed in args.lr_seed or args.seed[:1]:
        # Of a cross-validation the first fold is enough.
        tries.append({"seed": seed, "k_folds": args.k_folds, "fold": 0})
        if args.lr_epochs:
            tries[-1]["epochs"] = args.lr_epochs
    return tries


def all_rows(args: Namespace, given: dict[str, Any]) -> tuple[list[Row], list[str]]:
    """List the rows for all models, data sets and shares, and why others are left out.

    Raises:
        TrainerError: no method fits a model, or the baseline is none of the rows.
    """
    asked = rows_of(args.method, args.config, given)
    rows: list[Row] = []
    missing = []
    # The largest share first, which tells soonest whether the settings are any good.
    shares = sorted(set(args.get("fraction", [None])), reverse=True)
    for model in args.model:
        kept, left_out = fitting(asked, given | {"model": model})
        missing += [f"{label} {reason}" for label, reason in left_out.items()]
        if not kept:
            raise TrainerError(f"No method fits {model}: {'; '.join(missing)}")
        kept = chosen(kept, args.row)
        labels = [row.label for row in kept]
        if args.baseline is not None and args.baseline not in labels:
            named = ", ".join(labels)
            raise TrainerError(
                f"--baseline {args.baseline} is not among the rows ({named}). Name one of them."
            )
        for share in shares:
            for row in kept:
                own = row if share is None else on_share(row, given, share, args.stretch)
                rows += [own.with_settings(model=model, data=data) for data in args.data]
    return rows, missing


def chosen(rows: list[Row], names: Sequence[str] | None) -> list[Row]:
    """Keep the rows of some names, all for None.

    Raises:
        TrainerError: there is no row of a name.
    """
    labels = [row.label for row in rows]
    for name in names or []:
        if name not in labels:
            raise TrainerError(f"--row {name} is not among the rows ({', '.join(labels)}). Name one of them.")
    return [row for row in rows if names is None or row.label in names]


def on_share(row: Row, given: dict[str, Any], share: float, stretch: float) -> Row:
    """Give a row on a share of the training images.

    With the epochs of the whole, a hundredth of the images would get a hundredth of the steps, and a method
    that learns slowly would seem to need data where it needs time. An epoch goes through them more often:
    more epochs would be more validations too, which on few images cost more than the training.
    """
    repeat = round(min(stretch, 1 / share) * settings_of(row, given).repeat)
    return row.with_settings(train_fraction=share, repeat=repeat)
