"""Time a training step of several runs at once on one frozen trunk against that of one run.

    python benchmarks/together.py
    python benchmarks/together.py --model tf_efficientnet_lite0 --method lst --runs 2

It is what the trainer does with runs that differ in learning rate alone (`study.py compare --together`):
`torch.func.vmap` computes once what no run trains, and the rest for each. A row has the time of a step of all
runs over that of one, and over that of as many by themselves: below 1 it pays. Beside it stands the share in
operations, by which a study decides. On one thread of a CPU the times are those of the process.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import left_out
from networks import build, example
from step import loss_of
from tables import markdown, write_json
from timing import add_arguments, interleaved, ratios, where
from torch import Tensor, nn

import medpeft
from medpeft.reports.costs import costs

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from trainer.training.several import Several

KEPT = ", prefix kept"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear_probe": ("linear_probe", {}),
    "lst": ("lst", {}),
    "dtl, joined at the end": ("dtl", {"start": 1.0}),
    "dtl": ("dtl", {}),
    "lora, last quarter": ("lora", {"depth": 0.25}),
    "ssf, last quarter": ("ssf", {"depth": 0.25}),
    f"lora, last quarter{KEPT}": ("lora", {"depth": 0.25}),
    f"ssf, last quarter{KEPT}": ("ssf", {"depth": 0.25}),
    "lora": ("lora", {}),
    "ssf": ("ssf", {}),
}


def main() -> None:
    """Measure what the command line asks for and print a table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit_small_patch16_224", help="any of timm's")
    parser.add_argument("--method", action="append", choices=list(CASES), help="repeatable; all by default")
    parser.add_argument("--runs", type=int, default=4, metavar="K", help="at once")
    add_arguments(parser, repeats=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for case in args.method or CASES:
        try:
            rows.append(measured(args, case))
        except medpeft.MedpeftError as reason:
            print(left_out(case, reason))
    write_json(args.json, {"model": args.model, "runs": args.runs, "where": where(args), "rows": rows})
    print(f"{args.model}, {args.runs} runs at once, {where(args)}, median of {args.repeats}\n")
    print(table(rows, args.runs))


def measured(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Measure one row: the seconds of a step of one run, the ratio of a step of all, and the operations."""
    method, options = CASES[case]
    model = medpeft.apply(build(args.model, args.device, args.image_size), method, **options)
    (inputs,) = example(args.model, args.batch, args.image_size, args.device)
    if case.endswith(KEPT):
        split = medpeft.prefix(model, inputs)
        model, inputs = split.rest, split.features(inputs)
    several = Several(model, args.runs)
    steps: dict[str, Callable[[], None]] = {}
    for name, network in (("one", model), ("all", several)):
        steps[name] = partial(step, network, loss_of(network, (inputs,), False, args))
    figures = ratios(interleaved(steps, args.repeats, args.device))
    share = costs(several, inputs).training_flops / (args.runs * costs(model, inputs).training_flops)
    return {"case": case, **figures["all"], "one_seconds": figures["one"]["seconds"], "operations": share}


def step(network: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Run a step of one run or of several, up to the gradients."""
    loss().backward()
    network.zero_grad()


def table(rows: list[dict[str, Any]], runs: int) -> str:
    """Lay out the rows."""
    columns = ["", "one run, s", f"{runs} at once / one", f"/ {runs} by themselves", "range", "operations"]
    lines = []
    for row in rows:
        low, high = row["ratio_range"]
        shares = [f"{row['ratio'] / runs:.2f}", f"{low / runs:.2f}–{high / runs:.2f}"]
        line = [row["case"], f"{row['one_seconds']:.2f}", f"{row['ratio']:.2f}"]
        lines.append([*line, *shares, f"{row['operations']:.2f}"])
    return markdown(columns, lines)


if __name__ == "__main__":
    main()
