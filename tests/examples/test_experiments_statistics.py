"""Scores, intervals, ranks and crossings equal what is computed by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from experiments.statistics import average_ranks, bootstrap_interval, lead_of, macro_f1, pareto_front
from trainer.metrics import macro_f1 as trainer_macro_f1


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_macro_f1_of_a_confusion_matrix_is_that_of_the_predictions(classes):
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(classes, (40,), generator=generator)
    labels[labels == classes - 1] = 0  # the last class occurs in predictions alone
    probabilities = torch.rand(40, classes, generator=generator)
    confusion = np.zeros((classes, classes))
    np.add.at(confusion, (labels.numpy(), probabilities.argmax(1).numpy()), 1)
    assert macro_f1(confusion) == pytest.approx(trainer_macro_f1(probabilities, labels), abs=1e-6)


def test_macro_f1_leaves_out_a_class_that_occurs_nowhere():
    assert macro_f1([[3, 0, 0], [0, 5, 0], [0, 0, 0]]) == 1.0
    assert np.isnan(macro_f1(np.zeros((2, 2))))


def test_the_bootstrap_interval_of_one_run_is_that_of_resampled_predictions():
    confusion = np.array([[30, 10], [5, 15]])
    true, predicted = (axis.repeat(confusion.ravel()) for axis in np.indices((2, 2)).reshape(2, -1))
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(2000):
        drawn = rng.integers(60, size=60)
        matrix = np.zeros((2, 2))
        np.add.at(matrix, (true[drawn], predicted[drawn]), 1)
        scores.append(macro_f1(matrix))
    assert bootstrap_interval([confusion]) == pytest.approx(np.quantile(scores, [0.025, 0.975]), abs=0.015)


def test_the_interval_widens_with_the_spread_of_the_seeds_and_narrows_with_more_images():
    alike = [np.array([[40, 10], [10, 40]])] * 3
    apart = [np.array([[50, 0], [0, 50]]), np.array([[40, 10], [10, 40]]), np.array([[30, 20], [20, 30]])]

    def width(runs):
        low, high = bootstrap_interval(runs)
        return high - low

    assert width(apart) > 1.5 * width(alike)
    assert width([100 * run for run in alike]) < 0.2 * width(alike)
    assert bootstrap_interval(alike) == bootstrap_interval(alike)


def test_ranks_are_averaged_and_equal_scores_share_one():
    scores = pd.DataFrame({"a": [0.9, 0.8, 0.8], "b": [0.5, 0.7, np.nan]}, index=["full", "ssf", "lora"])
    assert average_ranks(scores).to_dict() == {"full": 1.5, "ssf": 1.75, "lora": 2.5}


def test_the_pareto_front_holds_what_nothing_beats():
    assert pareto_front([1, 2, 3, 4], [0.5, 0.7, 0.6, 0.9]) == [0, 1, 3]
    assert pareto_front([2, 2, 1], [0.5, 0.7, 0.7]) == [2]


@pytest.mark.parametrize(
    ("ours", "full", "ahead", "crossings"),
    [
        ([0.6, 0.7, 0.8], [0.4, 0.7, 0.9], True, [0.1]),
        ([0.6, 0.7, 0.8], [0.4, 0.6, 0.9], True, [0.1 * 10**0.5]),
        ([0.4, 0.6, 0.9], [0.6, 0.7, 0.8], False, [0.1 * 10**0.5]),
        ([0.6, 0.7, 0.8], [0.4, 0.6, 0.7], True, []),
        ([0.3, 0.4, 0.5], [0.4, 0.6, 0.7], False, []),
        ([0.6, 0.5, 0.8], [0.5, 0.6, 0.9], True, [0.01 * 10**0.5]),
        ([0.6, 0.7, 0.9], [0.4, 0.8, 0.8], True, [0.01 * 10 ** (2 / 3), 0.1 * 10**0.5]),
        ([0.6, 0.7, 0.9], [0.4, 0.8, 0.9], True, [0.01 * 10 ** (2 / 3)]),
        ([0.6, 0.7, 0.9], [0.6, 0.8, 0.8], False, [0.1 * 10**0.5]),
        ([0.6, 0.7, 0.9], [0.4, 0.7, 0.8], True, []),
    ],
)
def test_every_crossing_of_two_curves_is_found(ours, full, ahead, crossings):
    found = lead_of([0.01, 0.1, 1.0], ours, full)
    assert found.ahead == ahead
    assert list(found.crossings) == pytest.approx(crossings)


def test_equal_curves_have_no_lead():
    assert lead_of([0.01, 0.1, 1.0], [0.6, 0.7, 0.9], [0.6, 0.7, 0.9]) is None
