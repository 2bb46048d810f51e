"""Scores, intervals, verdicts, ranks and crossings equal what is computed by hand."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score
from study.bootstrap import draw_scores
from study.summary import (
    AHEAD,
    BEHIND,
    LEVEL,
    UNCLEAR,
    Record,
    across_data,
    crossings,
    pareto_front,
    summarise,
    verdict_of,
)
from trainer.judging.quick import macro_f1


def record(
    label, seed, confusion, data="one_set", fraction=1.0, model="a_model", order=None, val=0.5, **more
):
    """A run with these counts; `order` shuffles its images, so that it errs on others than the run beside it."""
    counts = np.array(confusion)
    true, predicted = (axis.repeat(counts.ravel()) for axis in np.indices(counts.shape).reshape(2, -1))
    if order is not None:
        for label_number in range(len(counts)):
            rows = np.flatnonzero(true == label_number)
            predicted[rows] = np.random.default_rng(order).permutation(predicted[rows])
    names = np.array(["benign", "malignant", "normal"])
    predictions = pd.DataFrame({"label": names[true], "prediction": names[predicted]})
    predictions.insert(0, "path", [f"{data}-{i}" for i in range(len(true))])
    settings = {
        "seed": seed,
        "lr": 0.001,
        "train_fraction": fraction,
        "epochs": 1,
        "batch_size": 2,
        "image_size": 32,
    }
    metrics = {
        "settings": settings,
        "images": {"train": {"a": round(100 * fraction)}, "test": {"a": len(true)}},
        "test": {"macro_f1": float(macro_f1(counts)), "auroc": None, "calibration_error": 0.1 + seed / 10},
        "best_val_score": val,
        "trainable": 100 * len(label),
        "saved_bytes": 2**20 * (1 + len(label)),
        "step_seconds": 0.01 * len(label),
        "seconds": 5.0,
    } | more
    metrics["test"]["mcc"] = counts[0, 0] / 100
    return Record(label, model, data, metrics, predictions)


WEAK, MIDDLE, STRONG = [[30, 20], [20, 30]], [[40, 10], [10, 40]], [[48, 2], [2, 48]]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_macro_f1_of_a_confusion_matrix_is_that_of_the_predictions(classes):
    rng = np.random.default_rng(classes)
    labels, predicted = rng.integers(classes, size=(2, 40))
    labels[labels == classes - 1] = 0  # the last class occurs in predictions alone
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels, predicted), 1)
    assert macro_f1(confusion) == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


def test_macro_f1_leaves_out_a_class_that_occurs_nowhere():
    assert macro_f1([[3, 0, 0], [0, 5, 0], [0, 0, 0]]) == 1.0
    assert np.isnan(macro_f1(np.zeros((2, 2))))


def test_the_bootstrap_of_one_run_is_that_of_resampled_predictions():
    run = record("ssf", 0, [[30, 10], [5, 15]]).predictions[["label", "prediction"]]
    numbers = (run == "malignant").to_numpy(dtype=int)
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(1000):
        matrix = np.zeros((2, 2))
        np.add.at(matrix, tuple(numbers[rng.integers(60, size=60)].T), 1)
        scores.append(macro_f1(matrix))
    found = np.quantile(draw_scores([[run]])[:, 0], [0.025, 0.975])
    assert found == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.015)


def test_the_interval_widens_with_the_spread_of_the_seeds_and_narrows_with_more_images():
    def width(runs):
        row = summarise([record("full", seed, run) for seed, run in enumerate(runs)]).iloc[0]
        return row["high"] - row["low"]

    assert width([STRONG, MIDDLE, WEAK]) > 1.5 * width([MIDDLE] * 3)
    assert width([(100 * np.array(MIDDLE)).tolist()] * 3) < 0.2 * width([MIDDLE] * 3)
    assert width([MIDDLE] * 3) == width([MIDDLE] * 3)


def test_rows_are_compared_on_the_same_images_and_said_to_be_ahead_behind_or_neither():
    runs = []
    for seed in range(3):
        runs += [record("full-frozen", seed, MIDDLE), record("ssf", seed, STRONG), record("bias", seed, WEAK)]
        runs.append(record("lora", seed, MIDDLE, order=7 + seed))
    found = summarise(runs).set_index("label")
    assert list(found.index) == ["ssf", "full-frozen", "lora", "bias"]
    assert found["verdict"].to_dict() == {"ssf": AHEAD, "full-frozen": "", "lora": UNCLEAR, "bias": BEHIND}
    assert found.loc["ssf", "difference"] == pytest.approx(0.16)
    assert np.isnan(found.loc["full-frozen", "difference"])
    # The separate intervals of two rows that err on the same images overlap, and the difference is plain.
    close = [[42, 8], [8, 42]]
    pair = summarise(
        [record("full", s, MIDDLE) for s in range(5)] + [record("ssf", s, close) for s in range(5)]
    )
    pair = pair.set_index("label")
    assert pair.loc["ssf", "low"] < pair.loc["full", "high"]
    assert pair.loc["ssf", "verdict"] == AHEAD


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (-0.019, 0.019, 0.02, LEVEL),
        (0.001, 0.019, 0.02, LEVEL),  # certain, and too small to matter
        (-0.019, 0.021, 0.02, UNCLEAR),
        (-0.03, 0.03, 0.02, UNCLEAR),
        (0.001, 0.021, 0.02, AHEAD),
        (0.03, 0.05, 0.02, AHEAD),
        (-0.02, -0.001, 0.02, BEHIND),
        (0.0, 0.0, 0.0, UNCLEAR),
        (0.001, 0.002, 0.0, AHEAD),
    ],
)
def test_a_verdict_follows_from_the_interval_and_the_margin(low, high, margin, verdict):
    assert verdict_of(low, high, margin) == verdict


def test_the_margin_is_what_the_verdicts_are_by():
    close = [record("full", s, [[41, 9], [9, 41]]) for s in range(5)]
    close += [record("ssf", s, [[42, 8], [8, 42]]) for s in range(5)]
    verdicts = [summarise(close, margin=margin)["verdict"].max() for margin in (0.0, 0.1)]
    assert verdicts == [AHEAD, LEVEL]


def test_two_runs_of_one_score_on_other_images_are_no_different():
    alike = summarise([record("full", 0, MIDDLE), record("ssf", 0, MIDDLE)]).set_index("label").loc["ssf"]
    other = (
        summarise([record("full", 0, MIDDLE), record("ssf", 0, MIDDLE, order=3)])
        .set_index("label")
        .loc["ssf"]
    )
    assert (alike["difference_low"], alike["difference_high"]) == (0, 0)
    assert other["difference_low"] < -0.02 < 0.02 < other["difference_high"]


def test_the_baseline_is_the_full_fine_tuning_that_validates_best_or_what_is_asked_for():
    runs = [record("full-frozen", 0, WEAK, val=0.8), record("full-adapt", 0, STRONG, val=0.7)]
    runs.append(record("ssf", 0, MIDDLE, val=0.9))
    assert set(summarise(runs)["baseline"]) == {"full-frozen"}
    assert set(summarise(runs, "ssf")["baseline"]) == {"ssf"}
    assert set(summarise(runs[2:])["baseline"]) == {"ssf"}


def test_rows_on_other_splits_are_not_compared():
    found = summarise([record("full", 0, MIDDLE), record("ssf", 1, STRONG)]).set_index("label")
    assert np.isnan(found.loc["ssf", "difference"])
    assert found.loc["ssf", "verdict"] == ""


def test_a_ranking_over_data_sets_needs_no_average_for_what_is_missing():
    runs = [record("full", 0, STRONG), record("full", 0, WEAK, data="other"), record("ssf", 0, MIDDLE)]
    runs += [record("ssf", 0, MIDDLE, data="other"), record("lora", 0, WEAK)]
    both = across_data(summarise(runs))
    assert both["average"].dropna().to_dict() == {"full": pytest.approx(0.78), "ssf": pytest.approx(0.8)}
    assert both["rank"].to_dict() == {"full": 1.5, "ssf": 1.5, "lora": 3.0}


def test_the_pareto_front_holds_what_nothing_beats():
    assert pareto_front([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.9]) == [0, 1, 3]
    assert pareto_front([2, 2, 1], [0.5, 0.7, 0.7]) == [2]


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([BEHIND, AHEAD, AHEAD], [(0.01, 0.1, True)]),
        ([BEHIND, UNCLEAR, AHEAD], [(0.01, 1.0, True)]),
        ([AHEAD, BEHIND, AHEAD], [(0.01, 0.1, False), (0.1, 1.0, True)]),
        ([UNCLEAR, UNCLEAR, AHEAD], []),
        ([BEHIND, UNCLEAR, UNCLEAR], []),
        (["", "", ""], []),
    ],
)
def test_a_crossing_is_named_only_between_shares_that_can_be_told_apart(verdicts, expected):
    rows = pd.DataFrame({"fraction": [1.0, 0.1, 0.01], "verdict": verdicts[::-1]})
    assert crossings(rows) == expected
