"""Thresholds are those that their rule asks for, on the curve that scikit-learn draws."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import precision_score, recall_score, roc_curve
from small_training import messages
from trainer.errors import TrainerError
from trainer.judging.thresholds import describe_rule, fit_threshold, measures_at, read_rule
from trainer.tasks import Outcome
from trainer.tasks.classify import Classify


@pytest.fixture
def findings():
    generator = np.random.default_rng(0)
    positive = generator.random(200) < 0.3
    return (generator.random(200) + positive).round(2) / 2, positive


def test_youden_is_the_highest_point_over_the_diagonal(findings):
    scores, positive = findings
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    found = measures_at(scores, positive, fit_threshold(scores, positive, "youden"))
    assert found["sensitivity"] + found["specificity"] - 1 == pytest.approx((true - false).max())


@pytest.mark.parametrize("least", [0.5, 0.9, 0.95, 1.0])
def test_a_sensitivity_is_reached_at_the_highest_specificity(findings, least):
    scores, positive = findings
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    threshold = fit_threshold(scores, positive, f"sensitivity={least}")
    found = measures_at(scores, positive, threshold)
    assert found["sensitivity"] >= least
    assert found["specificity"] == pytest.approx(1 - false[true >= least].min())


@pytest.mark.parametrize("least", [0.5, 0.9, 1.0])
def test_a_specificity_is_reached_at_the_highest_sensitivity(findings, least):
    scores, positive = findings
    false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
    found = measures_at(scores, positive, fit_threshold(scores, positive, f"specificity={least}"))
    assert found["specificity"] >= least
    assert found["sensitivity"] == pytest.approx(true[1 - false >= least].max())


def test_a_threshold_lies_halfway_between_two_images():
    scores = np.array([0.1, 0.2, 0.6, 0.9])
    assert fit_threshold(scores, np.array([False, False, True, True]), "youden") == pytest.approx(0.4)
    # Of equal sums the one that finds more.
    assert fit_threshold(scores, np.array([False, True, False, True]), "youden") == pytest.approx(0.15)
    assert fit_threshold(scores, scores < 0.9, "specificity=1") == pytest.approx(0.95)
    certain = np.array([0.2, 1.0])
    assert fit_threshold(certain, certain < 1, "specificity=1") > 1


def test_there_is_no_threshold_without_both_kinds_or_with_a_broken_model(findings):
    scores, _ = findings
    for positive in (np.zeros(200, bool), np.ones(200, bool)):
        assert np.isnan(fit_threshold(scores, positive, "youden"))
    assert np.isnan(fit_threshold(scores * np.nan, np.arange(200) < 9, "youden"))


def test_measures_are_those_of_the_four_counts(findings):
    scores, positive = findings
    called = scores >= 0.4
    found = measures_at(scores, positive, 0.4)
    assert found["sensitivity"] == pytest.approx(recall_score(positive, called))
    assert found["specificity"] == pytest.approx(recall_score(~positive, ~called))
    assert found["ppv"] == pytest.approx(precision_score(positive, called))
    assert found["npv"] == pytest.approx(precision_score(~positive, ~called))
    assert np.isnan(measures_at(scores, positive, 2.0)["ppv"])


def test_measures_of_a_draw_are_those_of_its_images(findings):
    scores, positive = findings
    counts = np.random.default_rng(1).integers(0, 3, (4, 200))
    drawn = measures_at(scores, positive, 0.4, counts.astype(float))
    for draw, own in enumerate(counts):
        rows = np.arange(200).repeat(own)
        for name, value in measures_at(scores[rows], positive[rows], 0.4).items():
            assert drawn[name][draw] == pytest.approx(value[0])


@pytest.mark.parametrize("rule", ["Youden", "sensitivity", "sensitivity=1.5", "f1=0.9", "specificity=x", ""])
def test_what_is_no_rule_is_refused(rule):
    with pytest.raises(TrainerError, match=r"is no rule\. Take youden"):
        read_rule(rule)


def test_a_rule_is_refused_before_an_image_is_read(capsys):
    assert "--threshold recall=0.9 is no rule" in messages(capsys, "--threshold", "recall=0.9", "--data", ".")
    assert "--coverage is 1.0; it must be above 0 and below 1" in messages(capsys, "--coverage", "1")


def test_a_rule_is_described_in_words():
    assert "sensitivity of at least 0.95 on the validation part" in describe_rule("sensitivity=0.95")
    assert "(Youden)" in describe_rule("youden")


# In the task


def outcome_of(seed, fitted):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (90,), generator=generator)
    logits = 2 * torch.nn.functional.one_hot(labels, 3) + torch.randn(90, 3, generator=generator)
    return Outcome(logits, labels, {"temperature": 1.0, **fitted})


def test_a_class_has_a_threshold_where_the_validation_part_has_images_with_and_without_it():
    task = Classify(["a", "b", "c"])
    fitted = task.fit_thresholds(outcome_of(0, {}), "sensitivity=0.9")
    assert list(fitted["operating"]["thresholds"]) == ["a", "b"]
    outcome = outcome_of(1, fitted)
    found = task.scores(outcome)["operating"]
    probabilities = outcome.outputs.softmax(1)
    for place, name in enumerate("ab"):
        threshold = fitted["operating"]["thresholds"][name]
        called = probabilities[:, place] >= threshold
        assert found[name]["threshold"] == threshold
        assert found[name]["sensitivity"] == pytest.approx(recall_score(outcome.targets == place, called))
    columns = task.predictions(outcome.outputs, outcome.fitted)
    assert columns["positive(b)"].tolist() == called.int().tolist()
    assert "positive(c)" not in columns


def test_the_table_has_each_threshold_with_the_intervals_of_its_measures():
    task = Classify(["a", "b", "c"])
    outcome = outcome_of(1, task.fit_thresholds(outcome_of(0, {}), "youden"))
    scores = task.scores(outcome)
    scores["intervals"] = task.intervals(outcome, np.arange(90), 0)
    low, high = scores["intervals"]["npv(a)"]
    assert low <= scores["operating"]["a"]["npv"] <= high
    shown = task.table(outcome, scores)
    assert f"{scores['operating']['a']['npv']:.3f} ({low:.3f} to {high:.3f})" in shown
    assert "the highest sensitivity + specificity on the validation part" in shown


def test_without_fitted_thresholds_there_is_nothing_of_them():
    outcome = outcome_of(0, {})
    task = Classify(["a", "b", "c"])
    assert "operating" not in task.scores(outcome)
    assert isinstance(task.predictions(outcome.outputs, outcome.fitted), pd.DataFrame)
