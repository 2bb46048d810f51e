"""Killed, resumed, in two processes, in micro-batches: a run computes the same."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train
from trainer import preparation
from trainer.batches import Part, make_transform, training_batches
from trainer.checkpoint import load_training
from trainer.errors import TrainerError
from trainer.flags import make_parser, parse
from trainer.images import Images
from trainer.models import build_model, checkpoint_activations
from trainer.order import FILLER, Order, balanced, step_seed

import medpeft

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
    found = {**RUN, "output": str(output), **{name.replace("_", "-"): value for name, value in changed.items()}}
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
    return subprocess.Popen(given, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
SHARED = SHORT | {"method": "bn+lora", "option": ["lora.rank=2"], "batchnorm": "frozen", "class-weights": True}


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
        [*torchrun, tmp_path / "both.py", json.dumps(given)], env=ENVIRONMENT, capture_output=True, text=True, check=False
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


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_all_processes_together_see_each_step_of_one(world, accumulate):
    alone = Order(37, 8, seed=3)
    alone.begin(2)
    steps = list(alone)
    assert [len(step) for step in steps] == [8, 8, 8, 8, 5]
    shares = []
    for rank in range(world):
        order = Order(37, 8, 3, accumulate, rank, world)
        order.begin(2)
        shares.append(list(order))
    assert len({len(share) for share in shares}) == 1
    whole_steps = len(shares[0]) // accumulate
    for step in range(whole_steps):
        seen = [key for share in shares for part in share[step * accumulate : (step + 1) * accumulate] for key in part]
        counted = [key for key in seen if key[1] != FILLER]
        assert sorted(counted) == sorted(steps[step])
        assert sorted(place for place, _ in counted) == sorted(alone.images(step).tolist())


# The order


def test_an_epoch_shows_every_image_once_and_the_next_in_another_order():
    order = Order(20, 4, seed=0)
    first = [key for batch in order for key in batch]
    order.begin(2)
    second = [key for batch in order for key in batch]
    assert sorted(place for place, _ in first) == list(range(20))
    assert [place for place, _ in first] != [place for place, _ in second]
    assert len({seed for _, seed in first + second}) == 40


def test_an_order_begins_at_any_step():
    order = Order(20, 4, seed=0)
    every = list(order)
    order.begin(1, step=3)
    assert list(order) == every[3:]
    assert len(order) == 2


@pytest.mark.parametrize(("count", "steps"), [(9, 2), (10, 3), (1, 1), (8, 2)])
def test_a_last_step_of_one_image_is_left_out(count, steps):
    order = Order(count, 4, seed=0)
    assert len(order) == len(list(order)) == steps


def test_a_last_step_too_small_for_all_processes_is_filled_up():
    shares = [list(Order(11, 8, seed=0, world=2, rank=rank)) for rank in (0, 1)]
    last = [share[-1] for share in shares]
    assert [len(part) for part in last] == [2, 2]
    assert [seed == FILLER for part in last for _, seed in part] == [False, False, False, True]


def test_what_fills_up_a_batch_has_no_part_in_the_loss():
    images = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), np.array([1, 0]), ["a", "b"], np.arange(2))
    part = Part(images, np.arange(2), make_transform(8, [0.5] * 3, [0.5] * 3, "light"))
    loaded, labels = next(iter(training_batches(part, Order(2, 2, seed=0, world=2, rank=1), 0)))
    assert loaded.shape == (2, 3, 8, 8)
    logits = torch.tensor([[0.3, 0.1], [9.0, -9.0]])
    counted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert counted[1] == 0 < counted[0]


def test_a_balanced_order_draws_every_class_as_often():
    labels = np.repeat([0, 1, 2], [1600, 300, 100])
    order = Order(2000, 100, seed=0, balance=balanced(labels))
    places = [place for batch in order for place, _ in batch]
    assert np.bincount(labels[places]) / 2000 == pytest.approx([1 / 3] * 3, abs=0.03)


def test_every_step_and_process_draws_its_own_dropout():
    seeds = {step_seed(seed, epoch, step, rank) for seed in (0, 1) for epoch in (1, 2) for step in range(5) for rank in (0, 1)}
    assert len(seeds) == 40


# Precision, memory, compilation


def test_activations_computed_again_give_the_same_gradients():
    x = torch.randn(2, 3, 64, 64)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        model = build_model("test_vit", 3, 64, pretrained=False)
        if again:
            checkpoint_activations(model)
        medpeft.apply(model, "lora", init="kaiming", seed=0)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        model.train()(x).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))
    assert min(float(g.abs().max()) for g in found[0]) > 0


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


def test_a_model_that_cannot_compute_activations_again_says_so():
    with pytest.raises(TrainerError, match=r"Linear cannot compute its activations again\. Leave --checkpoint-activations out"):
        checkpoint_activations(torch.nn.Linear(2, 2))


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
        ({"accumulate": 3}, "--batch-size 8 is the images of one optimizer step, and does not divide by --accumulate 3 × 1"),
        ({"accumulate": 0}, "--accumulate is 0; it must be at least 1"),
        ({"save_every": -1}, "--save-every is -1"),
    ],
)
def test_flags_of_devices_that_do_not_fit_say_so(tmp_path, capsys, given, message):
    assert train.main(flags(tmp_path, **given)) == 2
    assert message in capsys.readouterr().err
