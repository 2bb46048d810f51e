"""Peak memory of a training step: the forecast of `medpeft.fits` beside what a process takes.

    python benchmarks/peaks.py --batch 4
    python benchmarks/peaks.py --model resnet50 --method ssf

Each case runs three steps with AdamW in a fresh process, after one step of another model that loads the
libraries. Measured is the process' resident memory at its peak, above what it held before the model was
built. The allocator is told to give memory back at once; otherwise its fragments count too.
"""

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import torch
from memory import train
from networks import build, example, forward
from resident import forget_peak, give_back, peak, resident
from tables import markdown, write_json
from timing import add_arguments, where
from torch import nn

import medpeft
from medpeft.architecture.checkpointing import switch_on_checkpointing
from medpeft.reports.peak import forecast

LAST_QUARTER = ["blocks.9.*", "blocks.10.*", "blocks.11.*"]

CASES: dict[str, dict[str, tuple[dict[str, Any], bool]]] = {
    "vit_small_patch16_224": {
        "full": ({"method": "full"}, False),
        "full, checkpointing": ({"method": "full"}, True),
        "lora": ({"method": "lora"}, False),
        "lora, checkpointing": ({"method": "lora"}, True),
        "lora, last quarter": ({"method": "lora", "target": LAST_QUARTER}, False),
        "adaptformer": ({"method": "adaptformer"}, False),
        "linear_probe": ({"method": "linear_probe"}, False),
    },
    "resnet50": {
        "full": ({"method": "full"}, False),
        "ssf": ({"method": "ssf"}, False),
        "lora, last stage": ({"method": "lora", "target": "layer4.*"}, False),
    },
}

# glibc gives memory back at once, and one arena serves all threads.
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def main() -> None:
    """Measure what the command line asks for and print a table."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", choices=list(CASES), help="one of the models; both by default")
    parser.add_argument("--method", help="one of its cases; all by default")
    parser.add_argument("--case", action="store_true", help=argparse.SUPPRESS)
    add_arguments(parser, batch=4)
    args = parser.parse_args()
    args.device = "cpu"  # A GPU has an allocator of its own to ask.
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(args)))
        return
    rows = []
    for model, cases in CASES.items():
        if args.model in (None, model):
            rows += [in_own_process(model, case) for case in cases if args.method in (None, case)]
    write_json(args.json, {"where": where(args), "rows": rows})
    print(f"{where(args)}\n\n{table(rows)}")


def in_own_process(model: str, case: str) -> dict[str, Any]:
    """Measure one case in a process of its own."""
    command = [sys.executable, *sys.argv, "--model", model, "--method", case, "--case"]
    environment = {**os.environ, **ALLOCATOR}
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    row: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return row


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Forecast the peak of a case, then measure that of three steps."""
    keywords, checkpointing = CASES[args.model][args.method]
    warm_up(args, keywords, checkpointing)
    give_back()
    before = resident()
    model = built(args, keywords, checkpointing)
    inputs = example(args.model, args.batch, args.image_size)
    step = forecast(model, inputs)
    give_back()
    forget_peak()
    labels = torch.zeros(args.batch, dtype=torch.long)
    train(model, lambda: nn.functional.cross_entropy(forward(model, inputs), labels))
    return {
        "model": args.model,
        "case": args.method,
        "forecast_mib": step.peak_bytes / 2**20,
        "measured_mib": (peak() - before) / 2**20,
    }


def built(args: argparse.Namespace, keywords: dict[str, Any], checkpointing: bool) -> nn.Module:
    """Build and adapt a model."""
    model = medpeft.apply(build(args.model, "cpu", args.image_size), **keywords)
    if checkpointing:
        switch_on_checkpointing(model)
    return model.train()


def warm_up(args: argparse.Namespace, keywords: dict[str, Any], checkpointing: bool) -> None:
    """Take a step, and forecast one, so that libraries and their kernels are in memory."""
    model = built(args, keywords, checkpointing)
    inputs = example(args.model, 1, args.image_size)
    forecast(model, inputs)
    labels = torch.zeros(1, dtype=torch.long)
    train(model, lambda: nn.functional.cross_entropy(forward(model, inputs), labels))


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the forecasts beside the measurements."""
    lines = []
    for row in rows:
        ratio = row["forecast_mib"] / row["measured_mib"]
        numbers = [f"{row['forecast_mib']:.0f}", f"{row['measured_mib']:.0f}", f"{ratio:.3f}"]
        lines.append([row["case"], row["model"], *numbers])
    return markdown(["", "model", "forecast, MiB", "measured, MiB", "forecast / measured"], lines)


if __name__ == "__main__":
    main()
