"""Interrupted and resumed, in two processes, in micro-batches: a run computes the same."""

import json
import os
import signal
import subprocess
import sys
from itertools import chain, repeat
from pathlib import Path

import lightning
import pytest
import torch
import train
from safetensors.torch import load_file
from small_training import messages
from torch import nn
from trainer.run import run as run_settings
from trainer.settings import Settings
from trainer.training.module import warmup_cosine

SCRIPT = Path(train.__file__)
FOLDERS = os.pathsep.join(map(str, (SCRIPT.parent, SCRIPT.parents[1])))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": FOLDERS}
# Dropout, adapting BatchNorm and augmentation: everything that draws or remembers.
RUN = {
    "model": "test_efficientnet",
    "no_pretrained": True,
    "image_size": 32,
    "epochs": 3,
    "batch_size": 8,
    "method": "full+lora",
    "option": {"lora.dropout": 0.2, "lora.rank": 2},
    "batchnorm": "adapt",
    "lr": 0.003,
    "accelerator": "cpu",
    "quiet": True,
    "no_figures": True,
}


def settings(stripes, output, **changed):
    return Settings(**{**RUN, "data": str(stripes), "output": output, **changed})


def run(stripes, output, callbacks=(), **changed):
    return run_settings(settings(stripes, output, **changed), callbacks=callbacks)


def lasting(record):
    """Of a record, what does not say how fast or how large the process was, or where it wrote."""
    timed = {"seconds", "step_seconds", "peak_bytes", "settings"}
    history = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]]
    return {**{k: v for k, v in record.items() if k not in timed}, "history": history}


def losses(record):
    return [epoch[name] for epoch in record["history"] for name in ("train_loss", "val_loss")]


# Going on


class Cut(lightning.Callback):
    """Ends a run within an epoch, as a power cut does."""

    def __init__(self, epoch, batch=1):
        self.place = (epoch, batch)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == self.place:
            raise RuntimeError("cut")


@pytest.mark.parametrize("method", ["full+lora", "adaptformer", "lora"])
def test_a_run_cut_off_goes_on_bit_for_bit(stripes, tmp_path, method):
    more = {}
    if method == "adaptformer":
        more = {
            "method": method,
            "option": {},
            "batchnorm": "frozen",
            "model": "test_vit",
            "balanced_sampler": True,
        }
    if method == "lora":  # from images, in the last blocks, on features that are kept
        more = {
            "method": method,
            "option": {"dropout": 0.2, "init": "eva"},
            "batchnorm": "frozen",
            "model": "test_vit2",
            "depth": 0.25,
            "views": 2,
            "cache_features": tmp_path / "features",
        }
    whole = run(stripes, tmp_path / "whole", **more)
    for epoch in (1, 2):
        with pytest.raises(RuntimeError, match="cut"):
            run(stripes, tmp_path / "cut", [Cut(epoch)], **more)
        assert not (tmp_path / "cut" / "metrics.json").exists()
    assert lasting(run(stripes, tmp_path / "cut", **more)) == lasting(whole)
    saved, again = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    # What it went on from is not needed any more.
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_training_stops_early_keeps_the_best_epoch_and_does_not_go_on(stripes, tmp_path, monkeypatch):
    scores = chain([0.5, 0.8, 0.7, 0.6], repeat(0.9))
    monkeypatch.setattr("trainer.tasks.classify.macro_f1", lambda logits, labels: next(scores))
    more = {"epochs": 5, "patience": 2}
    # Cut off after the training had stopped, before the test.
    with monkeypatch.context() as patch:
        patch.setattr("trainer.run.peak_memory", None)
        with pytest.raises(TypeError):
            run(stripes, tmp_path, **more)
    seen = []

    class Count(lightning.Callback):
        def on_train_batch_end(self, *args, **more):
            seen.append(args)

    record = run(stripes, tmp_path, [Count()], **more)
    assert len(record["history"]) == 4
    assert record["best_epoch"] == 2
    assert record["best_val_score"] == pytest.approx(0.8)
    assert not seen


def test_an_interrupt_says_how_to_go_on(stripes, tmp_path, capsys, monkeypatch):
    class Interrupt(Cut):
        def on_train_batch_end(self, *args, **more):
            raise KeyboardInterrupt

    monkeypatch.setattr("train.run", lambda settings: run_settings(settings, callbacks=[Interrupt(0)]))
    given = ["--data", stripes, "--output", tmp_path, "--model", "test_efficientnet", "--no-pretrained"]
    assert train.main([str(flag) for flag in [*given, "--image-size", "32"]]) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_no_number_stops_with_advice(stripes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "trainer.tasks.classify.cross_entropy", lambda *args, **more: args[0].sum() * float("nan")
    )
    given = ["--data", stripes, "--output", tmp_path, "--model", "test_efficientnet", "--no-pretrained"]
    error = messages(capsys, *given, "--image-size", 32)
    assert "The training loss became nan in epoch 1" in error
    assert "Lower --lr" in error


def test_the_learning_rate_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.5
    assert max(rates) == rates[3] == 2.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01


# The same images, on however many processes


# Frozen: BatchNorm that adapts takes its statistics from each micro-batch. 24 images make 3 steps of 8.
SHARED = {
    "method": "bn+lora",
    "option": {"lora.rank": 2},
    "batchnorm": "frozen",
    "class_weights": True,
    "epochs": 2,
    "train_fraction": 12 / 13,
}


@pytest.fixture(scope="module")
def single(stripes, tmp_path_factory):
    return run(stripes, tmp_path_factory.mktemp("single") / "run", **SHARED)


def test_micro_batches_compute_the_same_step(stripes, single, tmp_path):
    assert sum(single["images"]["train"].values()) == 24
    four = run(stripes, tmp_path, **SHARED, accumulate=4)
    assert losses(four) == pytest.approx(losses(single), rel=1e-5)


# One process group for both: a second one under the same torchrun may meet the addresses of the first.
BOTH = """
import json, sys, torch
from trainer.run import run
from trainer.settings import Settings
for given in json.loads(sys.argv[1]):
    run(Settings(**given))
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_to_the_same_loss_as_one(stripes, single, tmp_path):
    (tmp_path / "both.py").write_text(BOTH)
    given = []
    for strategy in ("ddp", "fsdp2"):
        own = settings(stripes, tmp_path / strategy, **SHARED, devices=2, accumulate=2, strategy=strategy)
        given.append(own.plain())
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


# Precision, memory, compilation


def test_less_memory_waits_for_the_backward_pass(stripes, tmp_path):
    more = {"model": "test_vit", "method": "lora", "option": {"rank": 2}, "batchnorm": "frozen", "epochs": 1}
    plain = run(stripes, tmp_path / "plain", **more)
    less = run(stripes, tmp_path / "less", **more, checkpoint_activations=True)
    assert less["saved_bytes"] < 0.7 * plain["saved_bytes"]
    assert losses(less) == pytest.approx(losses(plain), rel=1e-4)


def test_half_precision_trains_close_to_single(stripes, tmp_path):
    # With frozen statistics: those of a batch of eight 1 × 1 maps magnify the rounding, by a quarter on a CPU
    # with bf16 units.
    stable = {"batchnorm": "frozen", "epochs": 1}
    whole = run(stripes, tmp_path / "32", **stable)
    half = run(stripes, tmp_path / "bf16", **stable, precision="bf16-mixed")
    assert losses(half) != losses(whole)
    assert losses(half) == pytest.approx(losses(whole), rel=0.02)


def test_a_compiled_model_trains_to_the_same_loss(stripes, tmp_path, monkeypatch):
    more = {"model": "test_vit", "method": "bias", "option": {}, "batchnorm": None, "epochs": 1}
    plain = run(stripes, tmp_path / "plain", **more)
    compiled = []
    original = nn.Module.compile

    def compile(network):
        compiled.append(network)
        # The graph is taken as by any backend; making C++ of it would take a minute.
        original(network, backend="eager")

    monkeypatch.setattr(nn.Module, "compile", compile)
    record = run(stripes, tmp_path / "compiled", **more, compile=True)
    assert losses(record) == pytest.approx(losses(plain), rel=1e-4)
    assert compiled
