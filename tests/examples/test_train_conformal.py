"""Conformal sets keep their promise on exchangeable images, and say what it rests on."""

import math

import numpy as np
import pytest
import torch
from trainer.judging.conformal import (
    conformal_quantile,
    coverage_of,
    describe_sets,
    fit_cutoff,
    score_sets,
    sets_of,
)
from trainer.tasks import Outcome
from trainer.tasks.classify import Classify


def draw(count, seed, classes=4):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    logits = generator.normal(size=(count, classes)) + 1.5 * np.eye(classes)[labels]
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum(1, keepdims=True), labels


@pytest.mark.parametrize(
    ("coverage", "count", "place"), [(0.9, 9, 9), (0.9, 99, 90), (0.9, 100, 91), (0.5, 9, 5)]
)
def test_the_quantile_has_the_correction_for_few_images(coverage, count, place):
    errors = np.random.default_rng(0).permutation(count) + 1.0
    assert conformal_quantile(errors, coverage) == place


def test_too_few_images_promise_nothing():
    assert conformal_quantile(np.arange(8.0), 0.9) == math.inf
    assert conformal_quantile(np.full(20, math.nan), 0.9) == math.inf
    probabilities, labels = draw(8, 0)
    fitted = fit_cutoff(probabilities, labels, 0.9)
    assert fitted == {"coverage": 0.9, "cutoff": 0.0, "images": 8}
    assert sets_of(probabilities, fitted["cutoff"]).all()
    shown = "\n".join(describe_sets(score_sets(np.ones((8, 4), bool), labels), fitted, {}))
    assert "8 validation images; below 9 a set has to hold all classes" in shown


@pytest.mark.parametrize("coverage", [0.7, 0.9])
def test_the_promise_holds_on_average_over_validation_parts(coverage):
    covered = []
    for seed in range(200):
        fitted = fit_cutoff(*draw(40, 2 * seed), coverage)
        probabilities, labels = draw(100, 2 * seed + 1)
        inside = sets_of(probabilities, fitted["cutoff"])
        covered.append(inside[np.arange(100), labels].mean())
    # At least the promise, and at most 1 / (n + 1) above it, but for the most probable class that joins.
    assert coverage - 0.01 < np.mean(covered) < coverage + 0.05


def test_a_set_has_the_classes_above_the_cutoff_and_never_none():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]])
    assert sets_of(probabilities, 0.3).tolist() == [[True, True, False], [True, True, False]]
    assert sets_of(probabilities, 0.5).tolist() == [[True, False, False], [True, False, False]]


def test_coverage_and_size_are_counted():
    inside = np.array([[True, False], [True, True], [True, False]])
    labels = np.array([0, 1, 1])
    found = score_sets(inside, labels)
    assert found["coverage"] == pytest.approx(2 / 3)
    assert found["mean_size"] == pytest.approx(4 / 3)
    assert found["sizes"] == [2, 1]
    assert found["coverage_per_class"] == [1, 0.5]
    drawn = coverage_of(inside, labels, np.array([[0.0, 0, 2], [1, 1, 0]]))
    assert drawn["set_coverage"].tolist() == [0, 1]
    assert drawn["set_size"].tolist() == [1, 1.5]


def test_the_task_fits_sets_scores_them_and_writes_them():
    task = Classify(["a", "b", "c", "d"])
    outcomes = []
    for seed in (0, 1):
        probabilities, labels = draw(80, seed)
        outcomes.append(
            Outcome(torch.tensor(probabilities).log(), torch.tensor(labels), {"temperature": 1.0})
        )
    fitted = {"temperature": 1.0, **task.fit_sets(outcomes[0], 0.8)}
    test = Outcome(outcomes[1].outputs, outcomes[1].targets, fitted)
    scores = task.scores(test)
    rows = [cell.split("|") for cell in task.predictions(test.outputs, fitted)["set"]]
    truths = task.truths(test.targets)["label"]
    held = np.mean([truth in row for truth, row in zip(truths, rows, strict=True)])
    assert held == pytest.approx(scores["sets"]["coverage"])
    assert np.mean(list(map(len, rows))) == pytest.approx(scores["sets"]["mean_size"])
    scores["intervals"] = task.intervals(test, np.arange(80), 0)
    low, high = scores["intervals"]["set_coverage"]
    assert low < held < high
    shown = task.table(test, scores)
    assert f"Sets that promise 0.8 hold the true class in {held:.3f} ({low:.3f} to {high:.3f})" in shown
    assert "the epoch was chosen on them too" in shown
