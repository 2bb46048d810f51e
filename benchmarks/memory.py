"""Memory of a training step: bytes kept for backward, and the peak above the model itself.

    python benchmarks/memory.py --model vit_small_patch16_224 --batch 8
    python benchmarks/memory.py --method lora --method svdiff
    python benchmarks/memory.py --below-the-floor

Each case runs three steps with AdamW. On a CPU it has a process of its own, and the peak is that of its
resident memory, above what it held with the model adapted and nothing run. On a GPU it is the allocator's.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from cases import BELOW, CASES, PEFTS, prepared
from networks import NAMES, example
from resident import forget_peak, give_back, peak, resident
from step import loss_of
from tables import markdown, write_json
from timing import add_arguments, bytes_kept, where
from torch import Tensor, nn


def main() -> None:
    """Measure what the command line asks for and print a table."""
    models = f"{', '.join(NAMES)}, or any of timm's"
    cases = ["floor", *CASES, PEFTS]
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit_small_patch16_224", help=models)
    parser.add_argument(
        "--method", action="append", choices=cases, help="repeatable; all that fit by default"
    )
    parser.add_argument("--below-the-floor", action="store_true", help="the methods that keep little")
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(args, args.case)))
        return
    rows = []
    usual = BELOW if args.below_the_floor else CASES
    for case in ["floor", *(args.method or usual)]:
        # A GPU's allocator tells the peak of each case by itself.
        row = in_own_process(case) if args.device == "cpu" else measure(args, case)
        if row is not None:
            rows.append(row)
    write_json(args.json, {"model": args.model, "where": where(args), "rows": rows})
    print(f"{args.model}, {where(args)}\n")
    print(table(rows))


def in_own_process(case: str) -> dict[str, Any] | None:
    """Measure one case in a process of its own; None if the method does not fit."""
    command = [sys.executable, *sys.argv, "--case", case]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    last = run.stdout.strip().splitlines()[-1]
    if not last.startswith("{"):
        return None
    row: dict[str, Any] = json.loads(last)
    return row


def measure(args: argparse.Namespace, case: str) -> dict[str, Any] | None:
    """Measure the bytes that one case keeps, and the peak of three steps."""
    inputs = example(args.model, args.batch, args.image_size, args.device)
    ready = prepared(args, case, inputs)
    if ready is None:
        return None
    loss = loss_of(ready.network, ready.inputs, case == "floor", args)
    before = memory_in_use(args.device)
    train(ready.model, loss)
    most = peak_memory(args.device) - before
    return {"case": case, "peak_mib": most / 2**20, "mib": bytes_kept(ready.model, loss) / 2**20}


def train(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Take three steps with AdamW; without a trainable parameter, three backward passes."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    for _ in range(3):
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def memory_in_use(device: str) -> int:
    """Count the bytes in use now, and let the peak count from here."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    give_back()
    forget_peak()
    return resident()


def peak_memory(device: str) -> int:
    """Count the most bytes in use at one time."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return peak()


def table(rows: list[dict[str, Any]]) -> str:
    """Lay out the rows, each beside the floor."""
    floor = rows[0]
    lines = []
    for row in rows:
        line = [row["case"]]
        for key in ("mib", "peak_mib"):
            line += [f"{row[key]:.0f}", f"{row[key] / floor[key]:.2f}"]
        lines.append(line)
    return markdown(["", "kept, MiB", "kept / floor", "peak, MiB", "peak / floor"], lines)


if __name__ == "__main__":
    main()
