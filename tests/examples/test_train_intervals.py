"""Intervals of a run's scores: by patient, as scikit-learn's scores of the images drawn, and quick."""

import time

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, matthews_corrcoef, roc_auc_score
from trainer.judging.quick import shown_scores
from trainer.judging.resampling import describe_draws, draws_of, intervals
from trainer.judging.scores import score
from trainer.tasks import Outcome
from trainer.tasks.classify import Classify


def outcome_of(count, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator) + torch.nn.functional.one_hot(labels, classes)
    return Outcome(logits, labels, {"temperature": 1.0})


@pytest.mark.parametrize(("count", "classes"), [(60, 2), (60, 3), (9, 4)])
def test_scores_of_a_draw_are_those_of_its_images(count, classes):
    outcome = outcome_of(count, classes)
    # Rounded: equal probabilities are thresholds together.
    probabilities = outcome.outputs.softmax(1).mul(8).round().div(8)
    counts = torch.randint(0, 3, (5, count), generator=torch.Generator().manual_seed(1))
    quick = shown_scores(probabilities.double().numpy(), outcome.targets.numpy(), counts.double().numpy())
    for draw, own in enumerate(counts):
        rows = torch.arange(count).repeat_interleave(own)
        expected = score(probabilities[rows], outcome.targets[rows])
        for name, values in quick.items():
            assert values[draw] == pytest.approx(expected[name], abs=1e-5, nan_ok=True), name


def test_scores_of_one_draw_are_those_of_scikit_learn():
    outcome = outcome_of(80, 2)
    probabilities, labels = outcome.outputs.softmax(1).double().numpy(), outcome.targets.numpy()
    found = shown_scores(probabilities, labels, np.ones((1, 80)))
    predicted = probabilities.argmax(1)
    assert found["macro_f1"][0] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["auroc"][0] == pytest.approx(roc_auc_score(labels, probabilities[:, 1]))
    both = [average_precision_score(labels == i, probabilities[:, i]) for i in (0, 1)]
    assert found["average_precision"][0] == pytest.approx(np.mean(both))
    assert found["mcc"][0] == pytest.approx(matthews_corrcoef(labels, predicted))


def test_a_patients_images_are_drawn_together():
    groups = np.array([7, 7, 3, 7, 9])
    (counts,) = draws_of(groups, 50, seed=0)
    assert counts.shape == (50, 5)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 0] == counts[:, 3]).all()
    assert (counts[:, 0] + counts[:, 2] + counts[:, 4] == 3).all()
    assert len(np.unique(counts, axis=0)) > 5


def test_the_interval_of_a_mean_is_the_one_of_statistics():
    values = np.random.default_rng(0).normal(size=400)
    found = intervals(lambda counts: {"mean": counts @ values / counts.sum(1)}, np.arange(400), 4000, 0)
    half = 1.96 * values.std() / 20
    assert found["mean"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.01)


def test_intervals_hold_the_scores_repeat_and_narrow_with_more_images():
    task, outcome = Classify(["a", "b", "c"]), outcome_of(60)
    found = task.intervals(outcome, np.arange(60), 0)
    scores = task.scores(outcome)
    for name in ("macro_f1", "balanced_accuracy", "auroc", "average_precision", "mcc"):
        low, high = found[name]
        assert low < scores[name] < high
    assert task.intervals(outcome, np.arange(60), 0) == found
    more = Outcome(outcome.outputs.repeat(9, 1), outcome.targets.repeat(9), outcome.fitted)
    narrow = task.intervals(more, np.arange(540), 0)["macro_f1"]
    assert narrow[1] - narrow[0] < 0.5 * (found["macro_f1"][1] - found["macro_f1"][0])
    # Nine images of each of 60 patients say no more than one of each does.
    by_patient = task.intervals(more, np.tile(np.arange(60), 9), 0)
    assert by_patient["macro_f1"] == pytest.approx(found["macro_f1"])
    assert by_patient["bootstrap"] == {"draws": 1000, "groups": 60, "images": 540}


def test_a_task_without_a_quick_way_has_the_same_intervals():
    outcome, groups = outcome_of(30), np.arange(30) // 2

    class Slow(Classify):
        draws = 20
        numbers = Classify.__bases__[0].numbers

    class Quick(Classify):
        draws = 20

    slow, quick = (kind(["a", "b", "c"]).intervals(outcome, groups, 0) for kind in (Slow, Quick))
    for name in Classify.words:
        assert slow[name] == pytest.approx(quick[name], abs=1e-5), name


def test_a_score_that_no_draw_defines_has_no_interval():
    outcome = Outcome(torch.randn(8, 2), torch.zeros(8, dtype=torch.long), {"temperature": 1.0})
    low, high = Classify(["a", "b"]).intervals(outcome, np.arange(8), 0)["auroc"]
    assert np.isnan([low, high]).all()


def test_the_table_shows_each_interval_and_what_it_rests_on():
    task, outcome = Classify(["a", "b", "c"]), outcome_of(40)
    scores = task.scores(outcome)
    scores["intervals"] = task.intervals(outcome, np.arange(40) // 4, 0)
    shown = task.table(outcome, scores)
    low, high = scores["intervals"]["mcc"]
    assert f"  {scores['mcc']:.4f}  {low:.4f} to {high:.4f}" in shown.replace("MCC  ", "")
    assert "1000 draws of the 10 groups (patients, copies) of 40 images; so few make them a hint" in shown
    assert describe_draws({"draws": 9, "groups": 30, "images": 30}) == "95 % intervals: 9 draws of 30 images"


def test_five_hundred_images_of_seven_classes_take_seconds_at_most():
    outcome = outcome_of(500, 7)
    begun = time.process_time()
    Classify(list("abcdefg")).intervals(outcome, np.arange(500), 0)
    assert time.process_time() - begun < 5
