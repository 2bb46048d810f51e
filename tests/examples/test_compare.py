"""A comparison runs what fits, once, survives being killed, and lays out what it found."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare
import pandas as pd
import pytest
import train
from experiments.cells import digest_of
from trainer.flags import make_parser, parse

EXAMPLES = Path(compare.__file__).parent
TINY = [
    "--model",
    "test_efficientnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--epochs",
    "1",
    "--train-fraction",
    "0.2",
]
METHODS = ["--method", "full", "linear_probe"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted comparison of two methods and two seeds on the default data."""
    output = tmp_path_factory.mktemp("finished")
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(output)]) == 0
    return output


def test_a_comparison_writes_all_its_results(finished):
    for name in (
        "scores.md",
        "scores.tex",
        "scores.csv",
        "report.html",
        "runs.jsonl",
        "pareto-test_efficientnet-tissue.png",
    ):
        assert (finished / name).stat().st_size > 100, name
    scores = pd.read_csv(finished / "scores.csv")
    assert list(scores["label"]) == ["full", "linear_probe"]
    assert list(scores["runs"]) == [2, 2]
    assert scores["saved_mib"].notna().all()
    assert scores["step_ms"].notna().all()
    assert scores["auroc"].between(0, 1).all()
    assert "### test_efficientnet on tissue: other scores" in (finished / "scores.md").read_text()
    assert not list(finished.glob("runs/*/last.ckpt"))
    assert len(list(finished.glob("runs/*/adapter.safetensors"))) == 4


def test_the_report_needs_nothing_but_itself(finished):
    text = (finished / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 1
    for outside in ("http:", "https:", "<script", "<link", 'src="/', 'src="p'):
        assert outside not in text, outside


def test_finished_runs_are_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr("experiments.runs.run_cell", lambda *_: pytest.fail("a recorded run was run again"))
    before = (finished / "scores.csv").read_text()
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(finished)]) == 0
    assert (finished / "scores.csv").read_text() == before
    assert "4 of 4 runs" in capsys.readouterr().out


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_comparison_killed_twice_gives_the_same_table(finished, tmp_path):
    command = [
        sys.executable,
        EXAMPLES / "compare.py",
        *TINY,
        *METHODS,
        "--seed",
        "0",
        "1",
        "--output",
        tmp_path,
    ]
    records = tmp_path / "runs.jsonl"
    for lines in (1, 2):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        # Killed after some runs are recorded and while another is under way.
        wait_for(lambda n=lines: records.exists() and len(records.read_bytes().splitlines()) >= n, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert not (tmp_path / "scores.md").exists()
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "scores.md").read_text() == (finished / "scores.md").read_text()
    assert (tmp_path / "scores.tex").read_text() == (finished / "scores.tex").read_text()
    assert len(records.read_bytes().splitlines()) == 4


def test_learning_rates_are_found_by_validation_and_written_for_other_scripts(tmp_path):
    given = ["--method", "linear_probe", "--seed", "0", "--lr-factors", "0.1", "1", "--output", str(tmp_path)]
    assert compare.run([*TINY, *given]) == 0
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    rates = [run["settings"]["lr"] for run in runs]
    assert rates[:2] == [0.0003, 0.003]
    assert (
        len(rates) == len(set(rates)) <= 4
    )  # two beyond the edge at most; the final run is one of the trials
    best = max(runs, key=lambda run: (run["val"]["macro_f1"], -run["val_loss"]))
    settings = tmp_path / "settings" / "test_efficientnet-tissue-0.2" / "linear_probe.yaml"
    assert pd.read_csv(tmp_path / "scores.csv")["lr"][0] == best["settings"]["lr"]
    assert (
        compare.run([*TINY, "--method", "--config", str(settings), "--seed", "0", "--output", str(tmp_path)])
        == 0
    )
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(
        runs
    )  # the file asks for a run that is there


def test_a_run_that_fails_ends_itself_alone(tmp_path, capsys):
    (tmp_path / "wild.yaml").write_text("method: full\nlr: 1.0e+30\n")
    given = [
        "--method",
        "linear_probe",
        "--config",
        str(tmp_path / "wild.yaml"),
        "--seed",
        "0",
        "--output",
        str(tmp_path),
    ]
    assert compare.run([*TINY, *given]) == 1
    assert list(pd.read_csv(tmp_path / "scores.csv")["label"]) == ["linear_probe"]
    assert (
        "full on test_efficientnet, tissue, seed 0 failed: The training loss became"
        in capsys.readouterr().out
    )


def test_a_cross_validation_tests_every_image_once(tmp_path):
    given = [
        "--method",
        "linear_probe",
        "--seed",
        "0",
        "--k-folds",
        "3",
        "--lr-factors",
        "1",
        "--output",
        str(tmp_path),
    ]
    assert compare.run([*TINY, *given]) == 0
    tested = [name for file in tmp_path.glob("runs/*/predictions.csv") for name in pd.read_csv(file)["image"]]
    assert sorted(tested) == list(range(576))
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [3]
    assert "3 of 3 runs; seeds 0, each with 3 folds" in (tmp_path / "report.html").read_text()
    assert (
        "fold"
        not in (tmp_path / "settings" / "test_efficientnet-tissue-0.2" / "linear_probe.yaml").read_text()
    )


def test_a_run_on_two_devices_is_started_as_a_command_of_its_own(tmp_path, monkeypatch):
    started = []

    def run(command, **_):
        """Do on one device what the command does on two, which test_train_devices.py sees to."""
        assert command[:2] == [sys.executable, train.__file__]
        args = parse(make_parser(""), list(map(str, command[2:])))
        started.append((args.devices, digest_of(args)))
        train.run(argparse.Namespace(**vars(args) | {"devices": 1}))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    given = [
        "--method",
        "lora",
        "--option",
        "rank=2",
        "--seed",
        "0",
        "--devices",
        "2",
        "--output",
        str(tmp_path),
    ]
    assert compare.run([*TINY, *given]) == 0
    (record,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert started == [(2, record["key"])]
    assert record["settings"]["option"] == {"lora": {"rank": 2}}
    assert list(pd.read_csv(tmp_path / "scores.csv")["mean"]) == [record["test"]["macro_f1"]]


@pytest.mark.parametrize(
    "said", ["a warning\ntrain.py: the batch does not divide\nmore", "Traceback\nthe batch does not divide\n"]
)
def test_a_run_that_fails_in_its_own_processes_is_told_of(tmp_path, capsys, monkeypatch, said):
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, stderr=said)
    )
    given = [
        "--method",
        "linear_probe",
        "--seed",
        "0",
        "--devices",
        "2",
        "--accelerator",
        "cpu",
        "--output",
        str(tmp_path),
    ]
    assert compare.run([*TINY, *given]) == 1
    assert ": failed. the batch does not divide\n" in capsys.readouterr().out


def test_shards_share_the_runs(tmp_path):
    given = [*TINY, "--method", "linear_probe", "--seed", "0", "1", "--output", str(tmp_path)]
    assert compare.run([*given, "--shard", "2/2"]) == 0
    assert len((tmp_path / "runs-2.jsonl").read_text().splitlines()) == 1
    assert compare.run([*given, "--shard", "1/2"]) == 0
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--resume"], "--resume is set by the study"),
        (
            ["--k-folds", "3", "--fold=1"],
            "--fold is set by the study: it resumes, its runs are quiet, and --k-folds runs all",
        ),
        (["--k-folds", "1"], "--k-folds is 1; take at least 2 folds"),
        (["--data", "a/x", "b/x"], "--data has two data sets called x"),
        (["--method", "lra"], "Unknown method 'lra'. Did you mean 'lora'"),
        (["--method", "attention"], "No method fits test_efficientnet"),
        (["--shard", "1/2", "--lr-factors", "1"], "--shard cannot be combined with --lr-factors"),
        (
            ["--seed", "0", "1", "--lr-factors", "1", "--lr-seeds", "3"],
            "--lr-seeds is 3; it must be from 1 to 2",
        ),
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(capsys, tmp_path, given, message):
    assert compare.main([*TINY, *given, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main([*TINY, "--output", str(tmp_path)]) == 2
    assert "torchrun would run the whole study in every process" in capsys.readouterr().err


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium")
def test_the_report_opens_in_a_browser_with_its_picture(finished, tmp_path):
    # The page reports on itself: how many rows there are, and how wide the picture is that was decoded.
    text = (finished / "report.html").read_text()
    probe = (
        "<script>addEventListener('load', () => { document.title = [...document.images].map(i => i.naturalWidth)"
        " + ' ' + document.querySelectorAll('tbody tr').length + ' ' + (document.body.scrollWidth <= innerWidth) })</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    flags += " --disable-sync --disable-quic --window-size=1000,800 --virtual-time-budget=5000 --dump-dom"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    command = [
        browser,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{tmp_path / 'page.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    width, rows, fits = done.stdout.partition("<title>")[2].partition("</title>")[0].split()
    assert int(width) > 1000
    assert (rows, fits) == ("6", "true")  # three tables of two methods
