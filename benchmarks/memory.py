"""Memory of a training step: bytes kept for backward, and the peak of a process of its own above the model itself.

    python benchmarks/memory.py --model vit_small_patch16_224 --batch 8
    python benchmarks/memory.py --method lora --method svdiff

Each case runs three steps with AdamW in a fresh process. On a CPU the peak is that of the process' resident memory, above
what it held with the model adapted and nothing run; on a GPU it is the allocator's.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from networks import NAMES, build, example
from step import CASES, adapted, frozen, loss_of
from timing import add_arguments, bytes_kept, where


def main() -> None:
    """Measure what the command line asks for and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help=f"{', '.join(NAMES)}, or any of timm's")
    parser.add_argument("--method", action="append", choices=["floor", *CASES], help="repeatable; all that fit by default")
    parser.add_argument("--case", choices=["floor", *CASES], help=argparse.SUPPRESS)
    add_arguments(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(measure(args)))
        return
    rows = [row for case in ["floor", *(args.method or CASES)] if (row := in_own_process(case)) is not None]
    if args.json:
        Path(args.json).write_text(json.dumps({"model": args.model, "where": where(args), "rows": rows}, indent=2) + "\n")
    print(table(rows, args))


def in_own_process(case: str) -> dict[str, Any] | None:
    """The figures of one case; None where the method does not fit."""
    command = [sys.executable, *sys.argv, "--case", case]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    last = done.stdout.strip().splitlines()[-1]
    found: dict[str, Any] | None = json.loads(last) if last.startswith(("{", "null")) else None
    return found


def measure(args: argparse.Namespace) -> dict[str, Any] | None:
    """Bytes kept and the peak of three steps of one case."""
    if args.case == "floor":
        model = frozen(build(args.model, args.device))
    else:
        found = adapted(args, args.case)
        if found is None:
            return None
        model = found
    inputs = example(args.model, args.batch, args.image_size, args.device)
    loss = loss_of(model, inputs, args.case == "floor", args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    before = held(args.device)
    for _ in range(3):
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
    peak = most(args.device) - before
    return {"case": args.case, "peak_mib": peak / 2**20, "mib": bytes_kept(model, loss) / 2**20}


def held(device: str) -> int:
    """Bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def most(device: str) -> int:
    """Most bytes in use at one time."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The rows as a Markdown table, with what they were measured on."""
    floor = rows[0]
    lines = [f"{args.model}, {where(args)}", "", "| | kept, MiB | kept / floor | peak, MiB | peak / floor |"]
    lines += ["|---|--:|--:|--:|--:|"]
    for r in rows:
        kept, peak = r["mib"] / floor["mib"], r["peak_mib"] / floor["peak_mib"]
        lines.append(f"| {r['case']} | {r['mib']:.0f} | {kept:.2f} | {r['peak_mib']:.0f} | {peak:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
