"""The one command for a GPU, tried on a CPU; each of its parts ends in its time."""

import json
import subprocess
import sys
import time

import pytest
import torch
from gpu import Part, main, parts, table, within
from places import ROOT

TRIED = [
    "--device",
    "cpu",
    "--tiny",
    "--part",
    "tests",
    "--part",
    "step, ResNet-50, float32",
]


@pytest.mark.slow
def test_one_command_gives_a_table_and_a_file(tmp_path):
    out = tmp_path / "gpu.json"
    command = [str(ROOT / "benchmarks" / "gpu.sh"), *TRIED, "--json", str(out)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert [part["name"] for part in found["parts"]] == ["tests", "step, ResNet-50, float32"]
    assert not any(part["problem"] for part in found["parts"])
    assert "skipped" in found["parts"][0]["result"]["summary"]
    assert "| step, ResNet-50, float32 | lora, last quarter, prefix kept |" in done.stdout


def test_the_table_has_a_line_for_every_call_and_every_problem():
    start = Part("start", "start.py", [], 1, {"rows": {"lora": {"apply": 1.25, "file, KiB": 3.0}}})
    row = {"library": "peft", "ratio": 1.5, "ratio_range": [1.4, 1.6], "seconds": 0.002, "mib": 3.0}
    floor = {**row, "library": "floor", "mib": 2.0}
    peers = Part("peers", "peers.py", [], 1, {"tasks": {"SSF": [floor, row]}})
    figures = {"add": 9.0, "use": 0.5, "one": 0.1, "seconds": 0.11, "ratio": 1.1, "ratio_range": [1.0, 1.2]}
    bank = Part("bank", "bank.py", [], 1, {"rows": {"lora": figures}})
    late = Part("late", "step.py", [], 1, problem="took longer than 1 s")
    lines = table([start, peers, late, bank]).splitlines()
    assert lines[2] == "| start | lora: apply |  |  | 1.2 |  |  |"
    assert lines[4] == "| peers, SSF | peft | 1.50 | 1.40–1.60 | 2.00 | 1.50 |  |"
    assert lines[5].startswith("| late | took longer than 1 s |")
    assert lines[8] == "| bank | lora: one for all images | 1.00 |  | 100.00 |  |  |"
    assert lines[9] == "| bank | lora: one for each image | 1.10 | 1.00–1.20 | 110.00 |  |  |"


def test_all_parts_together_stay_within_eight_minutes():
    assert sum(part.seconds for part in parts()) <= 480


def test_a_part_that_takes_too_long_is_ended_with_what_it_started():
    begun = time.perf_counter()
    # The output ends only when all that write into it have ended.
    status, output = within(["sh", "-c", "sleep 60 & echo begun; sleep 60"], 1)
    assert (status, output) == (None, "begun\n")
    assert time.perf_counter() - begun < 20


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "Try --device cpu --tiny" in capsys.readouterr().err
