"""Runs trained at once are what each is by itself, and are trained at once only where that saves enough."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from study.cluster import _train
from study.groups import grouped
from study.trials import Trial
from trainer.run import run
from trainer.settings import Settings
from trainer.together import train_together, why_apart
from trainer.training.several import Several

RATES = (1e-3, 1e-1)
SMALL = {
    "no_pretrained": True,
    "image_size": 32,
    "batch_size": 8,
    "epochs": 3,
    "quiet": True,
    "no_figures": True,
}
# What they draw at random is the same for all.
DROPS = {"proj_drop_rate": 0.3, "attn_drop_rate": 0.1, "drop_path_rate": 0.2}
CASES = {
    "a ladder": {"model": "test_vit", "method": "lst"},
    "the last half, with dropout": {
        "model": "test_vit", "method": "lora", "depth": 0.5, "model_option": DROPS, "patience": 1
    },
    "a head on a convolutional network, in micro-batches": {
        "model": "test_efficientnet", "method": "linear_probe", "accumulate": 2, "class_weights": True,
    },
}  # fmt: skip


def settings_for(data, folder, **more):
    """Settings of a run at each rate."""
    several = []
    for rate in RATES:
        own = Settings(data=str(data), lr=rate, output=folder / f"{rate}", **{**SMALL, **more})
        several.append(own.checked())
    return several


@pytest.mark.parametrize("case", CASES)
def test_a_run_at_once_with_others_is_what_it_is_alone(case, stripes, tmp_path):
    several = settings_for(stripes, tmp_path / "at once", **CASES[case])
    found = [end() for end in train_together(several)]
    for own, record in zip(several, found, strict=True):
        alone = run(replace(own, output=tmp_path / f"{own.lr}"))
        assert len(record["history"]) == len(alone["history"])
        assert record["best_epoch"] == alone["best_epoch"]
        for one, other in zip(record["history"], alone["history"], strict=True):
            for name in ("train_loss", "val_loss", "val_macro_f1"):
                assert one[name] == pytest.approx(other[name], rel=1e-3), (own.lr, name)
        assert record["test"]["confusion_matrix"] == alone["test"]["confusion_matrix"]
        first, second = [
            pd.read_csv(path / "predictions.csv") for path in (own.output, tmp_path / f"{own.lr}")
        ]
        pd.testing.assert_frame_equal(first, second, rtol=1e-3)
        names, expected = [
            sorted(file.name for file in path.iterdir()) for path in (own.output, tmp_path / f"{own.lr}")
        ]
        assert names == expected
        assert record["together"]["runs"] == len(RATES)
        assert "step_seconds" not in record
        card = (own.output / "model-card.md").read_text()
        assert f"Trained at once with {len(RATES) - 1} others, all of them in" in card
    first, second = [load_file(own.output / "adapter.safetensors") for own in several]
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_run_whose_loss_is_no_number_ends_alone(stripes, tmp_path, monkeypatch):
    forward = Several.forward

    def spoiled(self, images):
        outputs = forward(self, images)
        spoils = torch.tensor([number == 0 for number in self.running]).view(-1, 1, 1)
        return torch.where(spoils, torch.nan, outputs)

    monkeypatch.setattr(Several, "forward", spoiled)
    several = settings_for(stripes, tmp_path, **CASES["a ladder"])
    outcome = _train({"number": 0}, [several])
    assert outcome["how"] == "at once"
    first, second = json.loads(outcome["runs"])
    assert first["failed"].startswith("The training loss became nan in epoch 1. Lower --lr")
    assert "TrainerError" in (several[0].output / "error.txt").read_text()
    assert not (several[0].output / "metrics.json").exists()
    assert second["words"] == "macro-F1"
    assert (several[1].output / "metrics.json").exists()


def test_what_cannot_be_trained_at_once_is_run_one_by_one(stripes, tmp_path, monkeypatch):
    def broken(self, images):
        raise RuntimeError("no memory\nat all")

    monkeypatch.setattr(Several, "forward", broken)
    outcome = _train({"number": 0}, [settings_for(stripes, tmp_path, **CASES["a ladder"], epochs=1)])
    assert outcome["how"] == "one by one, for at once they failed: no memory"
    assert all(one["score"] > 0 for one in json.loads(outcome["runs"]))


def test_a_group_that_was_cut_off_begins_anew_but_for_what_is_finished(stripes, tmp_path):
    several = settings_for(stripes, tmp_path, model="test_efficientnet", method="linear_probe", epochs=1)
    train_together(several)[1]()
    finished = (several[1].output / "metrics.json").stat().st_mtime_ns
    found = [end() for end in train_together(several)]
    assert (several[1].output / "metrics.json").stat().st_mtime_ns == finished
    assert [record["together"]["runs"] for record in found] == [1, 2]
    again = [end() for end in train_together(several)]
    assert [record["best_val_score"] for record in again] == [record["best_val_score"] for record in found]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"method": "lora", "model": "test_vit"}, "3 at once take 9.% of the operations"),
        ({"method": "full", "model": "test_efficientnet"}, "statistics of its BatchNorms adapt"),
        ({"method": "linear_probe", "precision": "bf16-mixed"}, "--precision bf16-mixed is for runs"),
        ({"method": "linear_probe", "cache_features": "kept"}, "--cache-features kept is for"),
        ({"method": "linear_probe", "task": "segment"}, "a decoder trains"),
    ],
)  # fmt: skip
def test_it_is_said_why_runs_are_not_trained_at_once(more, reason):
    own = Settings(**{**SMALL, "model": "test_efficientnet", **more}).checked()
    assert re.search(reason, why_apart(own, 3))


def test_heads_on_one_trunk_are_trained_at_once():
    own = Settings(**{**SMALL, "model": "test_efficientnet", "method": "linear_probe"}).checked()
    assert why_apart(own, 2) is None


def test_a_study_trains_at_once_what_differs_in_rate_alone(stripes, tmp_path, capsys, monkeypatch):
    reasons = {"linear_probe": None, "bias": "nothing is gained"}
    monkeypatch.setattr("study.groups.why_apart", lambda settings, count: reasons[settings.method])
    trials = []
    for more in ({"method": "linear_probe"}, {"method": "bias"}, {"method": "linear_probe", "seed": 1}):
        alike = settings_for(stripes, tmp_path / str(len(trials)), model="test_efficientnet", **more)
        alike.append(replace(alike[0], lr=0.5, output=alike[0].output.with_name("0.5")))
        trials += [Trial(own.method, "stripes", own) for own in alike]
    cut_off = trials[7].folder / "checkpoints"
    cut_off.mkdir(parents=True)
    (cut_off / "last.ckpt").touch()
    places = {id(trial): place for place, trial in enumerate(trials)}

    def shown(most):
        return [[places[id(trial)] for trial in group] for group in grouped(trials, most)]

    assert shown(1) == [[place] for place in range(9)]
    assert shown(4) == [[0, 1, 2], [6, 8], [7], [3], [4], [5]]
    assert (
        "bias on test_efficientnet, stripes: one by one, for nothing is gained\n" in capsys.readouterr().out
    )
    assert shown(2)[:2] == [[0, 1], [2]]
