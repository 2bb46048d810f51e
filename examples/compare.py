"""Which method for your data? Every method that fits, on your data sets, models and seeds.

Offline and in minutes, on patches of stained tissue; then on your own data, with a learning rate of its own for each method:

    python examples/compare.py --image-size 64 --epochs 3 --seed 0 1
    python examples/compare.py --data my/images other/images --model resnet50 vit_small_patch16_224 --lr-factors 0.3 1 3

It writes to --output: scores.md, scores.tex and scores.csv, a picture of score against cost for each model and data set,
report.html, which holds all of it, and runs.jsonl with a line for each finished run. Started again, it does what is missing.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from experiments import page
from experiments.cells import Cell, Choice, choices, file_name, fitting, make_cell
from experiments.command import exit_status
from experiments.figures import draw_pareto
from experiments.flags import make_parser, parse
from experiments.rates import best_rate, beyond, candidates, multiples, rate_of, with_rate
from experiments.records import Record
from experiments.runs import run_cells
from experiments.settings import write_settings
from experiments.study import Study, about, finished, in_order, missing
from experiments.summary import summarise
from experiments.tables import cost_table, score_table, to_html, write_tables
from trainer.errors import TrainerError

MORE = 2  # rates to try beyond the edge of a grid


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    return exit_status("compare.py", run, given)


def run(given: Sequence[str] | None = None) -> int:
    """Run what is missing and write the results; give the exit status, 1 if a run failed."""
    parser = make_parser(__doc__, "runs/compare")
    parser.add_argument("--lr-factors", nargs="+", type=float, metavar="X", help="try each method's learning rate times each X")
    parser.add_argument("--lr-epochs", type=int, metavar="N", help="epochs of those trials (default: those of the runs)")
    args, shared = parse(parser, given)
    if args.shard[1] > 1 and args.lr_factors:
        raise TrainerError(
            "--shard cannot be combined with --lr-factors: every machine would try every rate. Find the rates on one, then "
            f"give {args.output / 'settings'}/…/*.yaml to --config."
        )
    study = Study.of(args, shared)
    cells = cells_of(study)
    done = finished(study, cells)
    if done:
        write_results(study, done, len(cells), shlex.join(["compare.py", *(sys.argv[1:] if given is None else given)]))
    return 1 if study.failed else 0


def cells_of(study: Study) -> list[Cell]:
    """List the runs, after finding the learning rates if that was asked for."""
    args, cells = study.args, []
    rows = choices(args.method, args.config)
    for model in args.model:
        kept, left_out = fitting(rows, study.shared, model)
        study.left_out |= {f"{label} on {model}": reason for label, reason in left_out.items()}
        if not kept:
            raise TrainerError(f"No method fits {model}: {'; '.join(left_out.values())}")
        for data in args.data:
            tuned = [tune_rate(study, data, model, row) for row in kept] if args.lr_factors else kept
            cells += [make_cell(study.shared, data, model, row, s, args.output) for s in args.seed for row in tuned]
    return in_order(args, cells)


def tune_rate(study: Study, data: Path | None, model: str, row: Choice) -> Choice:
    """Give the row with the learning rate of the best validation score, on the first seed."""
    args = study.args
    rates = multiples(rate_of(study.shared, row), args.lr_factors)
    best = try_rates(study, data, model, row, rates)
    # The best of a grid is only known to be the best if there is a worse one on either side.
    for _ in range(MORE):
        if (further := beyond(rates, best)) is None:
            break
        rates.append(further)
        best = try_rates(study, data, model, row, rates)
    settings = make_cell(study.shared, data, model, with_rate(row, best), args.seed[0], args.output)
    write_settings(settings.args, args.output / "settings" / file_name(f"{model} on {settings.data}") / f"{row.label}.yaml")
    return with_rate(row, best)


def try_rates(study: Study, data: Path | None, model: str, row: Choice, rates: Sequence[float]) -> float:
    """Give the best of some rates."""
    args = study.args
    trials = candidates(row, rates, args.lr_epochs)
    cells = [make_cell(study.shared, data, model, trial, args.seed[0], args.output) for trial in trials]
    failed = run_cells(cells, study.records)
    found = study.records.read()
    done = [found[cell.key] for cell in cells if cell.key in found]
    if not done:
        raise TrainerError(f"No learning rate worked for {row.label} on {model}: {failed[-1][1]}")
    return best_rate(done)


def write_results(study: Study, done: list[Record], expected: int, command: str) -> None:
    """Write the tables, the pictures and the page; print the tables."""
    folder = study.args.output
    summary = summarise(done)
    tables = {str(model): score_table(rows) for model, rows in summary.groupby("model", sort=False)}
    print("\n" + write_tables(tables, summary, folder, "scores"))
    sections = [page.section("What was run", page.command(command), page.paragraph(about(done, expected)))]
    for model, rows in summary.groupby("model", sort=False):
        sections.append(page.section(f"Scores on {model}", page.wide(to_html(*tables[str(model)])), page.paragraph(LEGEND)))
        for data, group in rows.groupby("data", sort=False):
            title = f"{model} on {data}"
            costs = page.wide(to_html(*cost_table(group)))
            sections.append(page.section(title, draw(group, title, folder), costs, page.paragraph(COSTS)))
    if study.failed or study.left_out:
        sections.append(page.section("Not in the tables", page.listed(missing(study))))
    page.write_page(folder / "report.html", "Which method for these data?", sections)
    print("\n".join(missing(study)))
    print(f"{len(done)} of {expected} runs are in {folder / 'report.html'}")


LEGEND = (
    "Macro-F1 on the test images: mean ± standard deviation over the seeds, and a 95 % bootstrap interval over seeds and test "
    "predictions. Bold: the best of the column. Ranks are averaged over the data sets, 1 is the best."
)

COSTS = (
    "Medians over the seeds. What a step keeps for its backward pass is counted, the same on every machine. Peak memory is "
    "that of the graphics card or, without one, of the whole process; like the times it depends on what else the machine does."
)


def draw(rows: pd.DataFrame, title: str, folder: Path) -> str:
    """Draw score against cost; give the picture for the page."""
    file = folder / f"pareto-{file_name(title)}.png"
    draw_pareto(rows, title, file)
    return page.picture(file, f"Macro-F1 of every method against its cost, {title}")


if __name__ == "__main__":
    sys.exit(main())
