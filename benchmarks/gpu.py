"""Run the CUDA tests and the benchmarks on a GPU, one after another; print one table. See gpu.sh.

Every part is a process with a time limit of its own; together they are below eight minutes. What takes longer
or fails is named, and the others go on.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases import BELOW, LAST_QUARTER
from tables import markdown, spread, write_json

ROOT = Path(__file__).parent.parent
PEERS = ("peft", "lycoris", "loralib", "adapters")
VIT_B, VIT_L, RESNET = "vit_base_patch16_224", "vit_large_patch16_224", "resnet50"
TINY = {VIT_B: "test_vit2", VIT_L: "test_vit2", RESNET: "resnet10t"}
BELOW_THE_FLOOR = [word for case in BELOW for word in ("--method", case)]
STEPS = [*BELOW_THE_FLOOR, "--method", "lora", "--method", "ssf", "--method", "tsa"]
# Each case is compiled anew, which takes half a minute.
COMPILED = ["--compile", "--method", "full", "--method", "lora", "--method", LAST_QUARTER]
START = ["--method", "lora", "--method", "ssf", "--repeats", "3"]
BANK = ["--method", "lora", "--adapters", "8", "--repeats", "3"]
BFLOAT16 = ["--autocast", "bfloat16"]


@dataclass
class Part:
    """One process.

    Attributes:
        name: what it measures.
        script: of the benchmarks; pytest if it is empty.
        flags: of the script.
        seconds: the time limit.
        result: what the script wrote as JSON.
        problem: why there is no result.
    """

    name: str
    script: str
    flags: list[str]
    seconds: int
    result: dict[str, Any] = field(default_factory=dict)
    problem: str = ""


def parts() -> list[Part]:
    """List the parts, the most important ones first."""
    return [
        Part("tests", "", [], 50),
        Part("step, ViT-B, float32", "step.py", ["--model", VIT_B, *STEPS], 35),
        Part("step, ViT-B, bfloat16", "step.py", ["--model", VIT_B, *BFLOAT16, *STEPS], 35),
        Part("step, ResNet-50, float32", "step.py", ["--model", RESNET, *STEPS], 30),
        Part("step, ResNet-50, bfloat16", "step.py", ["--model", RESNET, *BFLOAT16, *STEPS], 30),
        Part("memory, ViT-B, float32", "memory.py", ["--model", VIT_B, *BELOW_THE_FLOOR], 25),
        Part("memory, ResNet-50, float32", "memory.py", ["--model", RESNET, *BELOW_THE_FLOOR], 25),
        Part("step, ViT-L, bfloat16", "step.py", ["--model", VIT_L, *BFLOAT16, *STEPS], 40),
        Part("step, ViT-L, float32", "step.py", ["--model", VIT_L, *STEPS], 35),
        Part("peers", "peers.py", ["--task", "LoRA, every linear layer", "--task", "SSF"], 30),
        Part("start, ViT-B", "start.py", ["--model", VIT_B, *START], 35),
        Part("bank, ViT-B", "bank.py", ["--model", VIT_B, *BANK], 20),
        Part("step, ViT-B, compiled", "step.py", ["--model", VIT_B, *COMPILED], 55),
        Part("step, ResNet-50, compiled", "step.py", ["--model", RESNET, *COMPILED], 35),
    ]


def main() -> None:
    """Run every part, and print what they found."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images a step")
    parser.add_argument("--tiny", action="store_true", help="tiny models and images, one round")
    parser.add_argument("--part", action="append", help="those whose names have this in them; repeatable")
    parser.add_argument("--json", default="gpu.json", metavar="FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that this torch can use. Try --device cpu --tiny.")
    begun = time.perf_counter()
    chosen = [one for one in parts() if any(word in one.name for word in args.part or [""])]
    for part in chosen:
        run(part, args)
    machine = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    seconds = time.perf_counter() - begun
    if args.tiny:
        machine += ", tiny models in place of those that are named"
    where = f"{machine}, batch {args.batch}, torch {torch.__version__}, {seconds:.0f} s in all"
    print(f"{where}\n\n{table(chosen)}")
    write_json(args.json, {"where": where, "parts": [vars(part) for part in chosen]})


def run(part: Part, args: argparse.Namespace) -> None:
    """Run a part within its time."""
    print(part.name, file=sys.stderr, flush=True)
    if part.script == "peers.py" and not any(map(importlib.util.find_spec, PEERS)):
        part.problem = f"none of {', '.join(PEERS)} is installed"
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = benchmark(part, args, file) if part.script else tests()
        status, output = within(command, part.seconds)
        if file.exists():
            part.result = json.loads(file.read_text(encoding="utf-8"))
    last = output.strip().splitlines()[-1:]
    if status is None:
        part.problem = f"took longer than {part.seconds} s"
    elif not part.script:
        part.result = {"summary": " ".join(last).strip("= "), "status": status}
    elif status:
        part.problem = " ".join(last)


def benchmark(part: Part, args: argparse.Namespace, file: Path) -> list[str]:
    """Write the command of a benchmark."""
    flags = [TINY.get(flag, flag) if args.tiny else flag for flag in part.flags]
    command = [sys.executable, str(ROOT / "benchmarks" / part.script), *flags]
    command += ["--device", args.device, "--json", str(file)]
    if part.script != "start.py":
        command += ["--batch", "1" if args.tiny else str(args.batch)]
        if args.tiny:
            command += ["--image-size", "64"]
    if args.tiny:
        command += ["--repeats", "1"]
    return command


def tests() -> list[str]:
    """Write the command of the CUDA tests. Other files may import what a bare machine lacks."""
    every = sorted((ROOT / "tests").rglob("test_*.py"))
    files = [str(path) for path in every if "@pytest.mark.cuda" in path.read_text(encoding="utf-8")]
    return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *files]


def within(command: list[str], seconds: int) -> tuple[int | None, str]:
    """Run a command and all that it starts; give its status, None if time ran out, and its output."""
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]
        return process.returncode, output


def table(done: list[Part]) -> str:
    """Lay out all parts as one table: what each measured, or why it did not."""
    lines = []
    for part in done:
        if part.problem:
            lines.append([part.name, part.problem, "", "", "", "", ""])
        elif not part.script:
            lines.append([part.name, part.result["summary"], "", "", "", "", ""])
        elif part.script == "start.py":
            lines += times(part)
        elif part.script == "bank.py":
            lines += of_bank(part)
        else:
            for name, rows in groups(part).items():
                lines += [[name, *line(row, rows[0])] for row in rows]
    columns = ["", "case", "step / floor", "range", "ms", "kept / floor", "peak, MiB"]
    return markdown(columns, lines)


def groups(part: Part) -> dict[str, list[dict[str, Any]]]:
    """Give the rows of a part, or of each of its tasks."""
    if "tasks" not in part.result:
        return {part.name: part.result["rows"]}
    return {f"{part.name}, {task}": rows for task, rows in part.result["tasks"].items()}


def line(row: dict[str, Any], floor: dict[str, Any]) -> list[str]:
    """Write what a row has; a compiled step does not tell what it keeps."""
    cells = [row.get("case") or row["library"], "", "", "", "", ""]
    if "ratio" in row:
        cells[1:4] = [f"{row['ratio']:.2f}", spread(row), f"{1e3 * row['seconds']:.2f}"]
    if row["mib"]:
        cells[4] = f"{row['mib'] / floor['mib']:.2f}"
    if "peak_mib" in row:
        cells[5] = f"{row['peak_mib']:.0f}"
    return cells


def times(part: Part) -> list[list[str]]:
    """Write a line for every call before and after training."""
    lines = []
    for method, calls in part.result["rows"].items():
        for call, milliseconds in calls.items():
            if call != "file, KiB":
                lines.append([part.name, f"{method}: {call}", "", "", f"{milliseconds:.1f}", "", ""])
    return lines


def of_bank(part: Part) -> list[list[str]]:
    """Write what a bank takes to add and use an adapter, and for a batch in which each image has its own."""
    lines = []
    for method, row in part.result["rows"].items():
        one = f"{1e3 * row['one']:.2f}"
        mixed = [f"{row['ratio']:.2f}", spread(row), f"{1e3 * row['seconds']:.2f}"]
        lines += [
            [part.name, f"{method}: add", "", "", f"{row['add']:.1f}", "", ""],
            [part.name, f"{method}: use", "", "", f"{row['use']:.1f}", "", ""],
            [part.name, f"{method}: one for all images", "1.00", "", one, "", ""],
            [part.name, f"{method}: one for each image", *mixed, "", ""],
        ]
    return lines


if __name__ == "__main__":
    main()
