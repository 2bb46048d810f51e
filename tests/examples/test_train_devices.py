"""Killed, resumed, in two processes, in micro-batches: a run computes the same."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import train
from safetensors.torch import load_file
from trainer import preparation
from trainer.checkpoint import load_training
from trainer.flags import make_parser, parse

SCRIPT = Path(train.__file__)
FOLDERS = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parents[1])))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": FOLDERS}
# Dropout, adapting BatchNorm and augmentation: everything that draws or remembers.
RUN = {
    "model": "test_efficientnet",
    "no-pretrained": True,
    "image-size": 32,
    "epochs": 2,
    "train-fraction": 0.25,
    "batch-size": 8,
    "method": "full+lora",
    "option": ["lora.dropout=0.2", "lora.rank=2"],
    "batchnorm": "adapt",
    "lr": 0.003,
    "accelerator": "cpu",
    "save-every": 3,
    "quiet": True,
    "no-figures": True,
}


def flags(output, **changed):
    found = {
        **RUN,
        "output": str(output),
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    spelled = []
    for name, value in found.items():
        if isinstance(value, bool):
            spelled += [f"--{name}"] if value else []
            continue
        for item in value if isinstance(value, list) else [value]:
            spelled += [f"--{name}", str(item)]
    return spelled


def run(output, **changed):
    return train.run(parse(make_parser(""), flags(output, **changed)))


SHORT = {"train_fraction": 0.06, "epochs": 1}


def start(output, **changed):
    given = [sys.executable, str(SCRIPT), *flags(output, **changed)]
    return subprocess.Popen(
        given, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def lasting(record):
    """Of a record, what does not say how fast or how large the process was, or where it wrote."""
    timed = {"seconds", "step_seconds", "peak_bytes", "settings", "test_predictions"}
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]]
    return {**{k: v for k, v in record.items() if k not in timed}, "history": history}


def losses(record):
    return [epoch[name] for epoch in record["history"] for name in ("train_loss", "val_loss")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return output, run(output, **TWICE)


TWICE = {"train_fraction": 0.12, "epochs": 2}


# Going on


def test_a_run_killed_within_an_epoch_goes_on_bit_for_bit(whole, tmp_path):
    process, checkpoint = start(tmp_path, **TWICE, save_every=1), tmp_path / "last.ckpt"
    try:
        until = time.monotonic() + 200
        while not (checkpoint.exists() and load_training(checkpoint)["step"] >= 2):
            time.sleep(0.02)
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until, "no checkpoint"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert load_training(checkpoint)["step"] > 0
    assert not (tmp_path / "metrics.json").exists()

    assert lasting(run(tmp_path, **TWICE, resume=True)) == lasting(whole[1])
    saved, again = (load_file(folder / "adapter.safetensors") for folder in (whole[0], tmp_path))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)


@pytest.mark.parametrize("method", ["adaptformer", "ssf+bn"])
def test_every_checkpoint_within_an_epoch_leads_to_the_same_end(tmp_path, method, monkeypatch):
    more = {
        "method": method,
        "option": [],
        "batchnorm": "frozen" if method == "adaptformer" else "adapt",
        "model": "test_vit" if method == "adaptformer" else "test_efficientnet",
        "save_every": 1,
    } | SHORT
    kept = []
    saved = preparation.save_training

    def save(fabric, training, settings, path):
        saved(fabric, training, settings, path)
        kept.append(path.read_bytes())

    monkeypatch.setattr(preparation, "save_training", save)
    expected = lasting(run(tmp_path / "whole", **more))
    assert len(kept) == 5
    for number in (0, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "last.ckpt").write_bytes(kept[number])
        assert lasting(run(folder, **more, resume=True)) == expected


# The same images, on however many processes


# Frozen: BatchNorm that adapts takes its statistics from each micro-batch. The last step has 5 of 8 images.
SHARED = SHORT | {
    "method": "bn+lora",
    "option": ["lora.rank=2"],
    "batchnorm": "frozen",
    "class-weights": True,
}


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return run(tmp_path_factory.mktemp("single"), **SHARED)


def test_micro_batches_compute_the_same_step(single, tmp_path):
    four = run(tmp_path, **SHARED, accumulate=4)
    assert losses(four) == pytest.approx(losses(single), rel=1e-5)


# One process group for both: a second one under the same torchrun may meet the addresses of the first.
BOTH = """
import json, sys, train
for given in json.loads(sys.argv[1]):
    train.run(train.parse(train.make_parser(""), given))
train.torch.distributed.destroy_process_group()
"""


def test_two_processes_train_to_the_same_loss_as_one(single, tmp_path):
    (tmp_path / "both.py").write_text(BOTH)
    several = {**SHARED, "devices": 2, "accumulate": 2}
    given = [flags(tmp_path / strategy, **several, strategy=strategy) for strategy in ("ddp", "fsdp2")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "both.py", json.dumps(given)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for strategy in ("ddp", "fsdp2"):
        record = json.loads((tmp_path / strategy / "metrics.json").read_text())
        assert losses(record) == pytest.approx(losses(single), rel=1e-4)
        assert record["test"]["confusion_matrix"] == single["test"]["confusion_matrix"]
        assert record["trainable"] == single["trainable"]
        # The checkpoint of several processes serves one: it holds whole tensors, not shards.
        again = run(tmp_path / strategy, **SHARED | {"accumulate": 2}, resume=True)
        assert again["history"] == record["history"]
        assert again["test"]["auroc"] == pytest.approx(record["test"]["auroc"], abs=1e-3)


# Precision, memory, compilation


def test_less_memory_waits_for_the_backward_pass(tmp_path):
    more = {
        "model": "test_vit",
        "method": "lora",
        "option": ["rank=2"],
        "batchnorm": "frozen",
        "train_fraction": 0.05,
        "epochs": 1,
    }
    plain = run(tmp_path / "plain", **more)
    less = run(tmp_path / "less", **more, checkpoint_activations=True)
    assert less["saved_bytes"] < 0.7 * plain["saved_bytes"]
    assert losses(less) == pytest.approx(losses(plain), rel=1e-4)


def test_half_precision_trains_close_to_single(tmp_path):
    # With frozen statistics: those of a batch of eight 1 × 1 maps magnify the rounding, by a quarter on a CPU with bf16 units.
    stable = SHORT | {"batchnorm": "frozen"}
    single, half = run(tmp_path / "32", **stable), run(tmp_path / "bf16", **stable, precision="bf16-mixed")
    assert losses(half) != losses(single)
    assert losses(half) == pytest.approx(losses(single), rel=0.02)


def test_a_compiled_model_trains_to_the_same_loss(tmp_path, monkeypatch):
    more = SHORT | {"model": "test_vit", "method": "bias", "option": []}
    plain = run(tmp_path / "plain", **more)
    compiled = []
    # The graph is taken as by any backend; making C++ of it would take a minute.
    original = partial(torch.compile, backend="eager")
    monkeypatch.setattr("torch.compile", lambda model, **_: compiled.append(model) or original(model))
    assert losses(run(tmp_path / "compiled", **more, compile=True)) == pytest.approx(losses(plain), rel=1e-4)
    assert compiled


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": "16-mixed"}, "--precision 16-mixed needs a CUDA GPU"),
        (
            {"accumulate": 3},
            "--batch-size 8 is the images of one optimizer step, and does not divide by --accumulate 3 × 1",
        ),
        ({"accumulate": 0}, "--accumulate is 0; it must be at least 1"),
        ({"save_every": -1}, "--save-every is -1"),
    ],
)
def test_flags_of_devices_that_do_not_fit_say_so(tmp_path, capsys, given, message):
    assert train.main(flags(tmp_path, **given)) == 2
    assert message in capsys.readouterr().err
