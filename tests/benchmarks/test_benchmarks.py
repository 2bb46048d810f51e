"""The benchmarks run and fill their tables; what they measure is not judged here, for machines are shared and noisy."""

import argparse
import json
import re
import runpy
import sys
import warnings

import pytest
import torch
from cases import BELOW, EVERY_LINEAR, PREFIX_KEPT, prepared
from places import ROOT
from step import inference_models
from torch import nn

TINY = ["--batch", "1", "--image-size", "32", "--repeats", "1", "--device", "cpu"]

INFERENCE = [
    "plain",
    "lora, every linear, adapted",
    "lora, every linear, merged",
    "ssf, adapted",
    "ssf, merged",
    "peft's lora, every linear",
]

CALLS = {
    "a step": (
        ["step.py", "--model", "resnet10t", "--method", "lora", "--method", "ssf", *TINY],
        ["floor", "lora", "ssf"],
    ),
    "a step below the floor": (
        ["step.py", "--model", "test_vit2", "--below-the-floor", *TINY],
        ["floor", *BELOW],
    ),
    "inference": (
        ["step.py", "--model", "resnet10t", "--inference", "--method", "ssf", *TINY],
        ["plain", "ssf, adapted", "ssf, merged"],
    ),
    "inference at two sizes": (
        [
            "step.py",
            "--model",
            "test_vit2",
            "--inference",
            "--batch",
            "1",
            "--repeats",
            "1",
            "--device",
            "cpu",
        ],
        INFERENCE * 2,
    ),
    "inference at one size": (["step.py", "--model", "test_vit2", "--inference", *TINY], INFERENCE),
    "memory": (
        ["memory.py", "--model", "resnet10t", "--method", PREFIX_KEPT, *TINY],
        ["floor", PREFIX_KEPT],
    ),
    "peaks": (
        ["peaks.py", "--model", "resnet50", "--method", "lora, last stage", *TINY],
        ["lora, last stage"],
    ),
    "peers": (
        [
            "peers.py",
            "--task",
            "TSA",
            "--batch",
            "1",
            "--image-size",
            "32",
            "--repeats",
            "1",
            "--device",
            "cpu",
        ],
        ["floor", "medpeft", "plain expression"],
    ),
    "bank": (["bank.py", "--model", "test_vit2", "--adapters", "2", *TINY], ["ssf", "lora", "bias"]),
    "together": (
        ["together.py", "--model", "test_vit2", "--method", "lst", "--method", "lora", *TINY],
        ["lst", "lora"],
    ),
    "start": (["start.py", "--model", "resnet10t", "--method", "ssf", "--repeats", "1"], ["ssf"]),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a benchmark as a command line would, within this process; gives what it prints."""

    def run(script, *flags):
        path = str(ROOT / "benchmarks" / script)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", [path, *flags])
        with warnings.catch_warnings(action="ignore"):  # A command only prints them.
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("kind", CALLS)
def test_a_benchmark_prints_a_row_for_every_case(kind, run, tmp_path):
    (script, *flags), cases = CALLS[kind]
    out = tmp_path / "rows.json"
    flags += [] if kind == "start" else ["--json", str(out)]
    printed = run(script, *flags)
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if re.match(r"\| [\w]", line)]
    assert rows[: len(cases)] == cases, printed
    if kind != "start":
        found = json.loads(out.read_text())
        assert "CPU" in found["where"]


def test_the_two_sizes_of_inference_are_each_compared_with_a_plain_model_of_that_size(run, tmp_path):
    out = tmp_path / "rows.json"
    flags = ["--model", "test_vit2", "--inference", "--batch", "2", "--repeats", "2", "--device", "cpu"]
    run("step.py", *flags, "--json", str(out))
    found = json.loads(out.read_text())
    assert "batch 2, 64 and 224 px" in found["where"]
    assert [row["image_size"] for row in found["rows"]] == [64] * len(INFERENCE) + [224] * len(INFERENCE)
    for row in found["rows"]:
        low, high = row["ratio_range"]
        assert 0 < low <= row["ratio"] <= high
        assert row["case"] != "plain" or low == high == 1


def test_lora_and_peft_adapt_the_same_layers_for_inference():
    args = argparse.Namespace(model="test_vit2", device="cpu", method=[EVERY_LINEAR])
    models = inference_models(args, size=64)
    ours, theirs = models["lora, every linear, adapted"], models["peft's lora, every linear"]
    linear = {name for name, layer in models["plain"].blocks.named_modules() if isinstance(layer, nn.Linear)}
    assert {
        n.partition(".adapters")[0] for n, _ in ours.blocks.named_modules() if n.endswith(".adapters.lora")
    } == linear
    wrapped = {n for n, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    assert {name.rpartition("blocks.")[2] for name in wrapped} == linear


def test_a_kept_prefix_is_stepped_from_its_features():
    args = argparse.Namespace(model="resnet10t", device="cpu", image_size=32, autocast=None)
    images = torch.randn(2, 3, 32, 32)
    ready = prepared(args, PREFIX_KEPT, (images,))
    assert ready.inputs[0].shape[1] > 3
    assert torch.equal(ready.network(*ready.inputs), ready.model(images))
