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
from experiments.cells import file_name
from experiments.command import exit_status
from experiments.figures import draw_pareto
from experiments.flags import make_parser, parse
from experiments.grid import cells_of
from experiments.rates import check_rate_flags, declare_rate_flags
from experiments.records import Record
from experiments.study import Study, about, finished, missing
from experiments.summary import summarise
from experiments.tables import cost_table, detail_table, score_table, to_html, write_tables


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    return exit_status("compare.py", run, given)


def run(given: Sequence[str] | None = None) -> int:
    """Run what is missing and write the results; give the exit status, 1 if a run failed."""
    parser = make_parser(__doc__, "runs/compare")
    declare_rate_flags(parser)
    args, shared = parse(parser, given)
    check_rate_flags(args)
    study = Study.of(args, shared)
    cells = cells_of(study)
    done = finished(study, cells)
    if done:
        write_results(
            study, done, len(cells), shlex.join(["compare.py", *(sys.argv[1:] if given is None else given)])
        )
    return 1 if study.failed else 0


def write_results(study: Study, done: list[Record], expected: int, command: str) -> None:
    """Write the tables, the pictures and the page; print the tables."""
    folder = study.args.output
    summary = summarise(done)
    tables = {str(model): score_table(rows) for model, rows in summary.groupby("model", sort=False)}
    sections = [page.section("What was run", page.command(command), page.paragraph(about(done, expected)))]
    for model, rows in summary.groupby("model", sort=False):
        sections.append(
            page.section(
                f"Scores on {model}", page.wide(to_html(*tables[str(model)])), page.paragraph(LEGEND)
            )
        )
        for data, group in rows.groupby("data", sort=False):
            title = f"{model} on {data}"
            details = tables[f"{title}: other scores"] = detail_table(group)
            parts = [draw(group, title, folder), page.wide(to_html(*details)), page.paragraph(DETAILS)]
            parts += [page.wide(to_html(*cost_table(group))), page.paragraph(COSTS)]
            sections.append(page.section(title, *parts))
    print("\n" + write_tables(tables, summary, folder, "scores"))
    if study.failed or study.left_out:
        sections.append(page.section("Not in the tables", page.listed(missing(study))))
    page.write_page(folder / "report.html", "Which method for these data?", sections)
    print("\n".join(missing(study)))
    print(f"{len(done)} of {expected} runs are in {folder / 'report.html'}")


LEGEND = (
    "Macro-F1 on the test images: mean ± standard deviation over the runs, and a 95 % bootstrap interval over runs and test "
    "predictions. Bold: the best of the column. Ranks are averaged over the data sets, 1 is the best."
)

DETAILS = (
    "Means ± standard deviations over the runs, on the test images. AUROC and average precision are means over the classes, "
    "one against the rest, and a dash where a test had no image of a class. The calibration error is after the temperature."
)

COSTS = (
    "Medians over the runs. What a step keeps for its backward pass is counted, the same on every machine. Peak memory is "
    "that of the graphics card or, without one, of the whole process; like the times it depends on what else the machine does."
)


def draw(rows: pd.DataFrame, title: str, folder: Path) -> str:
    """Draw score against cost; give the picture for the page."""
    file = folder / f"pareto-{file_name(title)}.png"
    draw_pareto(rows, title, file)
    return page.picture(file, f"Macro-F1 of every method against its cost, {title}")


if __name__ == "__main__":
    sys.exit(main())
