"""The runs of a study: every method that fits, on every data set, model and split."""

from collections.abc import Callable, Sequence

from trainer.errors import TrainerError

from .cells import Cell, Choice, choices, fitting
from .rates import Row, tuned
from .study import Study, in_order


def cells_of(
    study: Study, rows_of: Callable[[list[Choice]], Sequence[Choice]] = lambda kept: kept
) -> list[Cell]:
    """List the runs, after finding the learning rates if that was asked for.

    Args:
        study: what was asked for; the methods that do not fit are noted in it.
        rows_of: makes the rows out of the methods that fit a model, such as one for each share of the data.

    Raises:
        TrainerError: no method fits a model.
    """
    args = study.args
    asked = choices(args.method, args.config)
    rows: list[Row] = []
    for model in args.model:
        kept, left_out = fitting(asked, study.shared, model)
        study.left_out |= {f"{label} on {model}": reason for label, reason in left_out.items()}
        if not kept:
            raise TrainerError(f"No method fits {model}: {'; '.join(left_out.values())}")
        rows += [Row(data, model, choice) for choice in rows_of(kept) for data in args.data]
    if args.lr_factors:
        rows = tuned(study, rows)
    return in_order(args, [row.cell(study, split) for split in args.splits for row in rows])
