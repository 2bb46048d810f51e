"""Runs of the trainer that end at once, for tests of what a study makes of them."""

import json

import numpy as np
import pandas as pd
from sklearn.metrics import f1_score


def imagine(monkeypatch):
    """Let the runs of a study end at once, in this process; give the list of the settings that were run."""
    asked = []

    def run_all(trials, machines):
        failed = {}
        for trial in trials:
            if not trial.finished() and trial.folder not in failed:
                asked.append(trial.settings)
                if trial.settings.lr > 1:
                    failed[trial.folder] = "The training loss became nan"
                else:
                    write_run(trial.settings)
        return failed

    # Pictures take most of the time, and are looked at elsewhere.
    monkeypatch.setattr(
        "study.figures.draw_pareto", lambda rows, cost, title, path: path.write_bytes(b"picture")
    )
    monkeypatch.setattr("study.rates.run_all", run_all)
    monkeypatch.setattr("study.command.run_all", run_all)
    return asked


def write_run(settings):
    """Leave what the study reads of a run: 60 test images, on which longer names do better."""
    rng = np.random.default_rng([settings.seed, len(settings.method)])
    labels = np.random.default_rng(settings.seed).integers(2, size=60)
    right = rng.random(60) < 0.6 + 0.03 * len(settings.method)
    predicted = np.where(right, labels, 1 - labels)
    names = np.array(["benign", "malignant"])
    table = pd.DataFrame({"path": range(60), "label": names[labels], "prediction": names[predicted]})
    settings.output.mkdir(parents=True)
    table.to_csv(settings.output / "predictions.csv", index=False)
    # The best rate is 0.003.
    val = 0.5 - abs(np.log(settings.lr / 0.003)) / 20
    metrics = {
        "settings": settings.plain(),
        "images": {
            "train": {"benign": round(300 * settings.train_fraction), "malignant": 0},
            "test": {"benign": 60},
        },
        "trainable": 100 * len(settings.method),
        "saved_bytes": 2**20 * len(settings.method),
        "peak_bytes": 2**21,
        "step_seconds": 0.01,
        "seconds": 1.0,
        "best_epoch": 1,
        "best_val_score": val,
        "history": [{"train_loss": 1.0, "val_loss": 1.0, "val_macro_f1": val}],
        "digest": settings.digest(),
        "test": {"macro_f1": f1_score(labels, predicted, average="macro")},
    }
    (settings.output / "metrics.json").write_text(json.dumps(metrics))


def volume(verdicts):
    """Rows of a method beside full fine-tuning on three shares of the images, with these verdicts."""
    rows = [{"label": "full", "fraction": share, "mean": 0.5 + share / 3} for share in (0.01, 0.1, 1.0)]
    for share, verdict in zip((0.01, 0.1, 1.0), verdicts, strict=True):
        rows.append({"label": "ssf", "fraction": share, "mean": 0.6 + share / 4, "verdict": verdict})
    table = (
        pd.DataFrame(rows)
        .fillna({"verdict": ""})
        .assign(sd=0.01, baseline="full", margin=0.02, task="classify", data="one_set", lr=0.003)
    )
    table = table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.1)
    return table.assign(train_images=(500 * table["fraction"]).astype(int))
