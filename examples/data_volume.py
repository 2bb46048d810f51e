"""With how many images is a method ahead of full fine-tuning? Methods on nested shares of the training data.

Offline and in minutes, on patches of stained tissue; then on your own data, with a learning rate of its own for each method on
each share, for what is best on all the images may be far from it on a few:

    python examples/data_volume.py --method full linear_probe ssf --image-size 64 --epochs 3 --fraction 0.1 0.3 1 --seed 0 1
    python examples/data_volume.py --data my/images --method full ssf lora --lr-factors 0.3 1 3 --output runs/volume

The shares are stratified, each lies within the next, and validation and test stay whole. It writes to --output: volume.md,
volume.tex and volume.csv, a picture of the curves for each model and data set with the points where they cross that of full
fine-tuning, report.html, and runs.jsonl with a line for each finished run. Started again, it does what is missing.
"""

import shlex
import sys
from collections.abc import Sequence
from functools import partial

import pandas as pd
from experiments import page
from experiments.cells import Choice, file_name
from experiments.command import exit_status
from experiments.figures import draw_volume
from experiments.flags import make_parser, parse
from experiments.grid import cells_of
from experiments.rates import check_rate_flags, declare_rate_flags
from experiments.records import Record
from experiments.study import Study, about, finished, missing
from experiments.summary import leads, summarise
from experiments.tables import Table, rate_table, to_html, volume_table, write_tables
from trainer.errors import TrainerError
from trainer.flags import make_parser as make_run_parser
from trainer.flags import parse as parse_run

FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    return exit_status("data_volume.py", run, given)


def run(given: Sequence[str] | None = None) -> int:
    """Run what is missing and write the results; give the exit status, 1 if a run failed."""
    parser = make_parser(__doc__, "runs/data_volume")
    add = parser.add_argument
    add(
        "--fraction",
        nargs="+",
        type=float,
        default=FRACTIONS,
        metavar="F",
        help="(default: 0.01 0.05 0.1 0.25 0.5 1)",
    )
    add("--baseline", default="full", metavar="LABEL", help="row to compare with (default: full)")
    add(
        "--stretch",
        type=float,
        default=4.0,
        metavar="X",
        help="a smaller share has more epochs, for the steps of the whole, but at most X times as many (default: 4)",
    )
    declare_rate_flags(parser)
    args, shared = parse(parser, given)
    check_rate_flags(args)
    for fraction in args.fraction:
        if not 0 < fraction <= 1:
            raise TrainerError(
                f"--fraction {fraction:g} is no share: give numbers above 0 and at most 1, such as 0.1."
            )
    args.fraction = sorted(set(args.fraction))
    study = Study.of(args, shared)
    cells = cells_of(study, partial(shares_of, study))
    done = finished(study, cells)
    if done:
        command = shlex.join(["data_volume.py", *(sys.argv[1:] if given is None else given)])
        write_results(study, done, len(cells), command)
    return 1 if study.failed else 0


def shares_of(study: Study, kept: Sequence[Choice]) -> list[Choice]:
    """Give every method on every share; the largest share first, which tells soonest whether the settings are any good."""
    args = study.args
    require_baseline(args.baseline, kept)
    return [
        on_share(study.shared, choice, f, args.stretch) for f in reversed(args.fraction) for choice in kept
    ]


def require_baseline(baseline: str, rows: Sequence[Choice]) -> None:
    """Refuse a comparison with a row that is not there, before hours of runs."""
    labels = [row.label for row in rows]
    if baseline not in labels:
        raise TrainerError(
            f"--baseline {baseline} is not among the rows ({', '.join(labels)}). Add it, or name one of them."
        )


def on_share(shared: Sequence[str], choice: Choice, fraction: float, stretch: float) -> Choice:
    """Give a method on a share of the training data.

    With the epochs of the whole, a hundredth of the images would get a hundredth of the steps, and a method that learns
    slowly would seem to need data where it needs time.
    """
    asked = parse_run(make_run_parser(""), [*shared, *choice.flags])
    longer = min(stretch, 1 / fraction)
    epochs, patience = round(longer * asked.epochs), round(longer * asked.patience)
    share = ("--train-fraction", repr(fraction), "--epochs", str(epochs), "--patience", str(patience))
    return Choice(choice.label, (*choice.flags, *share))


def write_results(study: Study, done: list[Record], expected: int, command: str) -> None:
    """Write the tables, the pictures and the page; print the tables."""
    folder = study.args.output
    summary = summarise(done)
    tables: dict[str, Table] = {}
    sections = [page.section("What was run", page.command(command), page.paragraph(about(done, expected)))]
    for (model, data), rows in summary.groupby(["model", "data"], sort=False):
        title = f"{model} on {data}"
        tables[title], picture = lay_out(study, rows, title)
        rates = tables[f"{title}: learning rates"] = rate_table(rows)
        scores = [picture, page.wide(to_html(*tables[title])), page.paragraph(LEGEND)]
        sections.append(page.section(title, *scores, page.wide(to_html(*rates)), page.paragraph(RATES)))
    if study.failed or study.left_out:
        sections.append(page.section("Not in the tables", page.listed(missing(study))))
    print("\n" + write_tables(tables, summary, folder, "volume"))
    page.write_page(folder / "report.html", "How many images does each method need?", sections)
    print("\n".join(missing(study)))
    print(f"{len(done)} of {expected} runs are in {folder / 'report.html'}")


LEGEND = (
    "Macro-F1 on the test images: mean ± standard deviation over the runs, and a 95 % bootstrap interval over runs and test "
    "predictions. Bold: the best of the column. The last column: where the method is ahead of the baseline, from or until the "
    "shares of the training images at which their curves cross, interpolated."
)


RATES = "The learning rate of each method on each share; with --lr-factors, that of the best validation score there."


def lay_out(study: Study, rows: pd.DataFrame, title: str) -> tuple[Table, str]:
    """Give the table of one model on one data set, and its curves for the page."""
    baseline = study.args.baseline
    found = leads(rows, baseline)
    file = study.args.output / f"volume-{file_name(title)}.png"
    draw_volume(rows, found, baseline, title, file)
    return volume_table(rows, found, baseline), page.picture(
        file, f"Macro-F1 against the number of training images, {title}"
    )


if __name__ == "__main__":
    sys.exit(main())
