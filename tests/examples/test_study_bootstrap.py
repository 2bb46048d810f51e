"""Every score that a study draws equals the library's on the drawn images, and runs of every task compare."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score, r2_score, roc_auc_score
from study.bootstrap import SCORES, draw_scores
from study.page import answer
from study.summary import Record, other_scores, summarise
from study.tables import detail_table, score_table
from trainer.tasks import TASKS

COUNT = 40


def predictions(task, seed, noise):
    """Predictions for images whose truth follows from the seed: the less noise, the better."""
    truth, drawn = np.random.default_rng(seed), np.random.default_rng([seed, round(100 * noise)])
    table = pd.DataFrame({"path": [f"{i}.png" for i in range(COUNT)]})
    if task == "multilabel":
        for name in ("edema", "effusion"):
            there = truth.integers(0, 2, COUNT).astype(float)
            table[f"label({name})"] = there
            # Rounded, so that some are equal.
            table[f"p({name})"] = (there + drawn.normal(0, noise, COUNT)).round(1)
        table.loc[:5, "label(edema)"] = np.nan
        return table.astype(str).replace("nan", "").fillna("")
    if task == "regress":
        table["label"] = truth.normal(50, 10, COUNT)
        table["prediction"] = table["label"] + drawn.normal(0, 10 * noise, COUNT)
        return table.astype(str)
    grades = truth.integers(0, 4, COUNT)
    table["label"] = grades
    table["prediction"] = (grades + drawn.normal(0, noise, COUNT)).round().clip(0, 3).astype(int)
    return table.astype(str)


def by_library(task, table):
    """Score a table of predictions by scikit-learn."""
    if task == "multilabel":
        areas = []
        for name in ("edema", "effusion"):
            own = table[table[f"label({name})"] != ""].astype({f"label({name})": float, f"p({name})": float})
            areas.append(roc_auc_score(own[f"label({name})"], own[f"p({name})"]))
        return np.mean(areas)
    if task == "regress":
        return r2_score(table["label"].astype(float), table["prediction"].astype(float))
    if task == "ordinal":
        return cohen_kappa_score(
            table["label"], table["prediction"], weights="quadratic", labels=list("0123")
        )
    return f1_score(table["label"], table["prediction"], average="macro")


@pytest.mark.parametrize("task", ["classify", "multilabel", "ordinal", "regress"])
def test_a_score_of_weights_is_the_librarys_on_the_drawn_images(task):
    table = predictions(task, 0, 0.7)
    rng = np.random.default_rng(1)
    for _ in range(5):
        places = rng.integers(0, COUNT, COUNT)
        weights = np.bincount(places, minlength=COUNT)[None].astype(float)
        expected = by_library(task, table.iloc[places])
        found = SCORES[TASKS[task].score](table.drop(columns="path"), weights)
        assert found == pytest.approx(expected)


def test_dice_is_averaged_over_the_images_that_have_a_structure():
    table = pd.DataFrame(
        {"path": list("abc"), "dice(core)": ["0.5", "", "1.0"], "dice(edge)": ["0.2", "0.4", ""]}
    )
    weights = np.array([[1.0, 1, 1], [0, 3, 0], [2, 0, 1]])
    found = SCORES["dice"](table.drop(columns="path"), weights)
    assert found == pytest.approx([(0.75 + 0.3) / 2, 0.4, (2 / 3 + 0.2) / 2])


@pytest.mark.parametrize("task", ["multilabel", "ordinal", "regress"])
def test_images_about_which_all_tables_agree_are_drawn_together(task):
    tables = [predictions(task, 0, 0.3), predictions(task, 0, 0.9)]
    twice = [pd.concat([table, table]) for table in tables]
    scores = draw_scores([tables], TASKS[task].score, 300)
    assert scores.shape == (300, 2)
    assert scores[:, 0].mean() > scores[:, 1].mean()
    more = draw_scores([twice], TASKS[task].score, 300)
    assert more.std(axis=0)[1] < scores.std(axis=0)[1]


@pytest.mark.parametrize("task", ["multilabel", "ordinal", "regress"])
def test_runs_of_every_task_are_compared(task):
    kind = TASKS[task]
    runs = []
    for label, noise in (("full", 0.8), ("ssf", 0.2)):
        for seed in range(3):
            table = predictions(task, seed, noise)
            test = dict.fromkeys(other_scores(kind), 0.5) | {kind.score: by_library(task, table)}
            metrics = {
                "settings": {"seed": seed, "lr": 0.001, "task": task},
                "images": {"train": {"images": 100}},
                "test": test,
                "best_val_score": 0.5,
                "trainable": 10,
            }
            runs.append(Record(label, "a_model", "one_set", metrics, table))
    found = summarise(runs, draws=200)
    assert list(found["label"]) == ["ssf", "full"]
    assert found["verdict"].tolist() == ["ahead", ""]
    words = kind.words[kind.score]
    assert f"full fine-tuning (full, {words}" in answer(found)
    assert words[1:] in score_table(found).text.columns[0]
    assert len(detail_table(found).text.columns) == len(kind.words) - 1
