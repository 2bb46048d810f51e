"""A search tries what the method declares, goes on where it was interrupted, and writes what the other scripts read."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import yaml
from places import EXAMPLES

pytest.importorskip("ray", reason="needs the extra 'tune'")

from experiments.cells import choices, fitting
from experiments.settings import write_settings
from experiments.space import as_flags, defaults, search_space
from trainer.flags import make_parser, parse

import medpeft

TINY = [
    "--model",
    "test_efficientnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--train-fraction",
    "0.2",
    "--epochs",
    "2",
]


def run_arguments(*flags):
    return parse(make_parser(""), [*TINY, *flags])


def test_the_space_is_the_trainers_and_the_methods_own():
    space = search_space(run_arguments("--method", "lora+ssf"), set())
    assert set(space) == {"lr", "weight_decay", "augment", *medpeft.search_space("lora+ssf")}
    assert (space["lr"].lower, space["lr"].upper) == pytest.approx((3e-4, 3e-2))
    assert tuple(space["lora.rank"].categories) == medpeft.search_space("lora")["lora.rank"]
    assert "light" in space["augment"].categories


def test_what_is_given_is_not_searched():
    args = run_arguments("--method", "lora", "--option", "rank=3", "--lr", "0.01")
    assert set(search_space(args, {"lr"})) == {"weight_decay", "augment", "lora.dora"}


def test_the_first_point_is_what_the_trainer_would_do_without_a_search():
    args = run_arguments("--method", "lora")
    space = search_space(args, set())
    assert defaults(args, space) == {
        "lr": 0.003, "weight_decay": 0.01, "augment": "light", "lora.rank": 8, "lora.dora": False
    }  # fmt: skip


def test_a_method_that_does_not_fit_is_refused_before_anything_starts():
    args = run_arguments("--method", "adaptformer")
    with pytest.raises(medpeft.MedpeftError, match="'adaptformer' found nothing to train"):
        defaults(args, search_space(args, set()))


def test_a_point_survives_the_way_to_the_trainer_and_into_a_file(tmp_path):
    point = {
        "lr": 0.0123,
        "weight_decay": 0.0,
        "augment": "none",
        "lora.rank": 4,
        "lora.dora": True,
        "ssf.init": "official",
    }
    args = run_arguments("--method", "lora+ssf", *as_flags(point))
    assert (args.lr, args.weight_decay, args.augment) == (0.0123, 0.0, "none")
    assert args.option == {"lora": {"rank": 4, "dora": True}, "ssf": {"init": "official"}}

    write_settings(args, tmp_path / "best.yaml", point)
    again = parse(make_parser(""), ["--config", str(tmp_path / "best.yaml")])
    for name in ("method", "lr", "weight_decay", "augment", "option", "model", "epochs", "image_size"):
        assert getattr(again, name) == getattr(args, name), name
    assert not {"data", "seed", "output"} & set(yaml.safe_load((tmp_path / "best.yaml").read_text()))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A search of three points, interrupted after the first and taken up again; settings in a file beside it."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "tiny.yaml").write_text(f"model: {TINY[1]}\nno_pretrained: true\nimage_size: 32\nepochs: 2\n")
    command = [sys.executable, EXAMPLES / "tune.py", "--config", "tiny.yaml", "--train-fraction", "0.2"]
    command += ["--method", "lora", "--samples", "3", "--cpus", "1", "--output", folder]
    with (folder / "log").open("w") as log:
        first = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        end = time.monotonic() + 240
        while not any(done_trials(folder)):
            assert first.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGINT)
        assert first.wait(60) == 130, (folder / "log").read_text()
    (folder / "after").write_text(json.dumps([path.name for path in done_trials(folder)]))
    assert not (folder / "best.yaml").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=folder)
    assert second.returncode == 0, second.stdout + second.stderr
    (folder / "second").write_text(second.stdout)
    return folder


def done_trials(folder):
    """The trials that have reported their last epoch."""
    return [
        path.parent
        for path in folder.glob("trials/train_point_*/result.json")
        if len(path.read_text().splitlines()) >= 2
    ]


def test_an_interrupted_search_goes_on_with_what_is_left(output):
    trials = list(output.glob("trials/train_point_*/"))
    assert len(trials) == 3
    first = json.loads((output / "after").read_text())
    assert 1 <= len(first) < 3
    for name in first:
        results = (output / "trials" / name / "result.json").read_text().splitlines()
        assert [json.loads(line)["training_iteration"] for line in results] == [1, 2], (
            "a finished trial was trained again"
        )


def test_the_best_settings_are_those_of_the_best_trial(output):
    trials = pd.read_csv(output / "trials.csv")
    assert len(trials) == 3
    assert trials["best_val_macro_f1"].is_monotonic_decreasing
    best = yaml.safe_load((output / "best.yaml").read_text())
    assert best["method"] == "lora"
    assert best["lr"] == pytest.approx(trials["lr"][0])
    assert best["option"]["lora"]["rank"] == trials["lora.rank"][0]
    assert {0.003} <= set(trials["lr"].round(9)), "the trainer's own settings are among those tried"
    assert f"train.py --config {output / 'best.yaml'}" in (output / "second").read_text()


def test_the_other_scripts_read_the_best_settings(output):
    args = parse(make_parser(""), ["--config", str(output / "best.yaml"), "--seed", "5"])
    assert (args.method, args.model, args.epochs, args.seed) == ("lora", "test_efficientnet", 2, 5)
    rows, left_out = fitting(choices([], [output / "best.yaml"]), [], "test_efficientnet")
    assert [row.label for row in rows] == ["lora"]
    assert not left_out


def test_another_search_in_the_same_place_is_refused(output, monkeypatch):
    import tune

    monkeypatch.chdir(output)
    same = ["--config", "tiny.yaml", "--train-fraction", "0.2", "--method", "lora", "--output", str(output)]
    with pytest.raises(tune.TrainerError, match=r"search\.json is of a search with other samples \(3\)"):
        tune.run([*same, "--samples", "9"])
    (output / "tiny.yaml").write_text("epochs: 3\n")
    with pytest.raises(tune.TrainerError, match=r"search\.json is of a search with other flags"):
        tune.run([*same, "--samples", "3"])


def test_nothing_to_search_is_an_error(tmp_path, capsys):
    import tune

    given = [
        "--method",
        "bias",
        "--lr",
        "0.1",
        "--weight-decay",
        "0",
        "--augment",
        "none",
        "--output",
        str(tmp_path),
    ]
    assert tune.main([*TINY, *given]) == 2
    assert "Nothing is left to search" in capsys.readouterr().err


def test_several_devices_for_a_trial_are_refused(tmp_path, capsys):
    import tune

    assert tune.main([*TINY, "--method", "bias", "--devices", "2", "--output", str(tmp_path)]) == 2
    assert "--devices is 2, and a trial trains on one device, which Ray gives it" in capsys.readouterr().err


def test_a_storage_that_cannot_be_reached_is_an_error(tmp_path, capsys):
    import tune

    given = ["--method", "bias", "--storage", "nowhere://bucket/path", "--output", str(tmp_path)]
    assert tune.main([*TINY, *given]) == 2
    assert (
        "--storage nowhere://bucket/path cannot be reached: Protocol not known: nowhere"
        in capsys.readouterr().err
    )


def test_trials_that_break_off_are_an_error_with_the_first_reason(tmp_path, capsys):
    import tune

    class Results(list):
        @property
        def errors(self):
            return [RuntimeError("no space left on the device")] * len(self)

    assert tune.write_results(argparse.Namespace(output=tmp_path), [], Results(["first", "second"]), {}) == 1
    assert "2 of 2 trials broke off, the first with:\nno space left on the device" in capsys.readouterr().err
    assert not (tmp_path / "best.yaml").exists()
