"""On a cluster whose runs are all on the second machine: killed or interrupted, a study goes on and repeats nothing."""

import os
import signal
import time
from dataclasses import replace

import pandas as pd
import pytest
import yaml

pytest.importorskip("ray", reason="needs the extra 'study'")

from ray.cluster_utils import Cluster
from study.trials import make_trial, rows_of
from study_process import start, wait_for_end
from trainer.run import run
from trainer.settings import Settings

pytestmark = pytest.mark.slow

TINY = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32", "--train-fraction", "0.2"]
SETTINGS = {
    "model": "test_efficientnet",
    "no_pretrained": True,
    "image_size": 32,
    "train_fraction": 0.2,
    "epochs": 2,
}


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes, the first of which has no processors to run anything on."""
    # By default its workers are nicer than who starts them, and wait for the other tests.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("RAY_worker_niceness", "0")
    two = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    two.add_node(num_cpus=1)
    two.wait_for_nodes()
    yield two
    two.shutdown()
    monkeypatch.undo()


def wait_for(condition, process, folder, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.exitcode is None, (folder / "log").read_text()
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)


def finished(folder):
    """When each finished run was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/*/metrics.json")}


def test_a_comparison_killed_on_a_cluster_goes_on_and_repeats_nothing(cluster, tmp_path):
    words = ["compare", *TINY, "--epochs", "2", "--method", "linear_probe", "bias", "--seed", "0", "1"]
    words += ["--address", cluster.address]
    process = start(tmp_path, *words)
    wait_for(lambda: finished(tmp_path), process, tmp_path)
    os.killpg(process.pid, signal.SIGKILL)
    assert wait_for_end(process, 120) == -signal.SIGKILL
    assert not (tmp_path / "report.html").exists()
    before = finished(tmp_path)
    assert 1 <= len(before) < 4

    process = start(tmp_path, *words)
    assert wait_for_end(process, 300) == 0, (tmp_path / "log").read_text()
    after = finished(tmp_path)
    assert len(after) == 4
    assert before.items() <= after.items(), "a finished run was run again"
    assert f"[{4 - len(before)}/{4 - len(before)}]" in (tmp_path / "log").read_text()
    scores = pd.read_csv(tmp_path / "scores.csv").set_index("label")
    assert list(scores["runs"]) == [2, 2]

    # The runs of the cluster, the one that was cut off among them, are those of this process.
    for row in rows_of(["linear_probe", "bias"], [], {}):
        found = []
        for seed in (0, 1):
            trial = make_trial(row.with_settings(seed=seed), SETTINGS, tmp_path)
            assert trial.folder.name in after
            found.append(
                run(
                    replace(trial.settings, no_figures=True, output=tmp_path / "here" / f"{row.label}-{seed}")
                )["test"]["macro_f1"]
            )
        assert sum(found) / 2 == pytest.approx(scores.loc[row.label, "mean"], abs=1e-12)


def ended(folder):
    """What the trials have reported that reached their last epoch."""
    texts = {path.parent.name: path.read_text() for path in folder.glob("search/*/*/result.json")}
    return {name: text for name, text in texts.items() if '"epoch": 2' in text}


@pytest.fixture(scope="module")
def searched(cluster, tmp_path_factory):
    """A search of three points on the cluster, interrupted after the first and taken up again."""
    folder = tmp_path_factory.mktemp("search")
    words = [
        "tune",
        *TINY,
        "--epochs",
        "2",
        "--method",
        "lora",
        "--samples",
        "3",
        "--address",
        cluster.address,
    ]
    process = start(folder, *words)
    wait_for(lambda: ended(folder), process, folder)
    os.kill(process.pid, signal.SIGINT)
    assert wait_for_end(process, 120) == 130, (folder / "log").read_text()
    assert not (folder / "best.yaml").exists()
    before = ended(folder)
    process = start(folder, *words)
    assert wait_for_end(process, 300) == 0, (folder / "log").read_text()
    return folder, before


def test_an_interrupted_search_goes_on_with_what_is_left(searched):
    folder, before = searched
    assert 1 <= len(before) < 3
    assert before.items() <= ended(folder).items(), "a finished trial was trained again"
    assert len(list(folder.glob("search/*/*/result.json"))) == 3, "the search began anew"
    trials = pd.read_csv(folder / "trials.csv")
    assert len(trials) == 3
    assert trials["best_val_score"].is_monotonic_decreasing
    assert {0.001} <= set(trials["lr"].round(9)), "the trainer's own settings are among those tried"
    assert f"train.py --config {folder / 'best.yaml'}" in (folder / "log").read_text()


def test_the_best_settings_are_those_of_the_best_trial_and_every_script_reads_them(searched):
    folder, _ = searched
    best, trials = yaml.safe_load((folder / "best.yaml").read_text()), pd.read_csv(folder / "trials.csv")
    assert best["method"] == "lora"
    assert best["lr"] == pytest.approx(trials["lr"][0])
    assert best["augment"] == trials["augment"][0]
    assert best["option"]["lora"]["rank"] == trials["lora.rank"][0]
    (row,) = rows_of([], [folder / "best.yaml"], {})
    assert row.label == "lora"
    assert Settings(**best).checked().epochs == 2
