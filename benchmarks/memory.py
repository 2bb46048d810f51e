"""Memory of a training step: bytes kept for backward, and the peak above the model itself.

    python benchmarks/memory.py --model vit_small_patch16_224 --batch 8
    python benchmarks/memory.py --method lora --method svdiff

Each case runs three steps with AdamW in a fresh process. On a CPU the peak is that of the process' resident
memory, above what it held with the model adapted and nothing run. On a GPU it is the allocator's.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import NAMES, build, example
from step import CASES, adapted, frozen, loss_of
from tables import markdown, write_json
from timing import add_arguments, bytes_kept, where
from torch import Tensor, nn


def main() -> None:
    """Measure what the command line asks for and print a table."""
    models = f"{', '.join(NAMES)}, or any of timm's"
    cases = ["floor", *CASES]
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--model", default="vit_small_patch16_224", help=models)
    parser.add_argument(
        "--method", action="append", choices=cases, help="repeatable; all that fit by default"
    )
    parser.add_argument("--case", choices=cases, help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(args)))
        return
    rows = []
    for case in ["floor", *(args.method or CASES)]:
        row = in_own_process(case)
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


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Measure the bytes that one case keeps, and the peak of three steps."""
    model: nn.Module | None
    if args.case == "floor":
        model = frozen(build(args.model, args.device, args.image_size))
    else:
        model = adapted(args, args.case, args.image_size)
    if model is None:
        return None
    inputs = example(args.model, args.batch, args.image_size, args.device)
    loss = loss_of(model, inputs, args.case == "floor", args)
    before = memory_in_use(args.device)
    train(model, loss)
    peak = peak_memory(args.device) - before
    return {"case": args.case, "peak_mib": peak / 2**20, "mib": bytes_kept(model, loss) / 2**20}


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
    """Count the bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak_memory(device: str) -> int:
    """Count the most bytes in use at one time."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
