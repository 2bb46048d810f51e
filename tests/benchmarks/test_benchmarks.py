"""The benchmarks run and fill their tables; what they measure is not judged here, for machines are shared and noisy."""

import json
import re
import subprocess
import sys

import pytest
from places import ROOT

TINY = ["--batch", "1", "--image-size", "32", "--repeats", "1", "--device", "cpu"]

CALLS = {
    "a step": (["step.py", "--model", "resnet10t", "--method", "lora", "--method", "ssf", *TINY], ["floor", "lora", "ssf"]),
    "inference": (
        ["step.py", "--model", "resnet10t", "--inference", "--method", "ssf", *TINY],
        ["plain", "ssf, adapted", "ssf, merged"],
    ),
    "memory": (["memory.py", "--model", "resnet10t", "--method", "bias", *TINY], ["floor", "bias"]),
    "peers": (
        ["peers.py", "--task", "TSA", "--batch", "1", "--image-size", "32", "--repeats", "1", "--device", "cpu"],
        ["floor", "medpeft", "plain expression"],
    ),
    "start": (["start.py", "--model", "resnet10t", "--method", "ssf", "--repeats", "1"], ["ssf"]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_benchmark_prints_a_row_for_every_case(kind, tmp_path):
    (script, *flags), cases = CALLS[kind]
    out = tmp_path / "rows.json"
    flags += [] if kind == "start" else ["--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *flags], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if re.match(r"\| [\w]", line)]
    assert rows[: len(cases)] == cases, done.stdout
    if kind != "start":
        found = json.loads(out.read_text())
        assert "CPU" in found["where"]
