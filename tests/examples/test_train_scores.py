"""The trainer's scores equal scikit-learn's, and are NaN with a count where undefined."""

import json
import math

import pytest
import torch
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    roc_auc_score,
)
from torch.nn.functional import one_hot
from trainer.judging.scores import fit_temperature, score, without_nan
from trainer.tasks import Outcome
from trainer.tasks.classify import Classify

CLASSES = ["benign", "malignant", "normal"]


@pytest.fixture
def predictions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (60,), generator=generator)
    signal = one_hot(labels, 3)
    return (torch.randn(60, 3, generator=generator) + signal).softmax(1), labels


def test_scores_equal_those_of_scikit_learn(predictions):
    probabilities, labels = predictions
    predicted = probabilities.argmax(1)
    scores = score(probabilities, labels)
    assert scores["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert scores["auroc"] == pytest.approx(roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert scores["average_precision"] == pytest.approx(
        average_precision_score(one_hot(labels, 3), probabilities)
    )
    assert scores["mcc"] == pytest.approx(matthews_corrcoef(labels, predicted))
    assert scores["auroc_undefined_classes"] == 0
    assert scores["confusion_matrix"] == confusion_matrix(labels, predicted).tolist()


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    labels = torch.tensor([0, 0, 0, 1])
    sure = torch.tensor([[0.9, 0.1]] * 4)
    assert score(sure, labels)["calibration_error"] == pytest.approx(0.15)
    fair = torch.tensor([[0.75, 0.25]] * 4)
    assert score(fair, labels)["calibration_error"] == pytest.approx(0)


def test_auroc_of_two_classes_is_the_usual_one(predictions):
    probabilities, labels = predictions
    two, binary = probabilities[:, :2].softmax(1), (labels == 1).long()
    assert score(two, binary)["auroc"] == pytest.approx(roc_auc_score(binary, two[:, 1]))


def test_auroc_is_nan_with_a_count_where_a_class_does_not_occur(predictions):
    probabilities, labels = predictions
    kept = labels != 2
    scores = score(probabilities[kept], labels[kept])
    assert math.isnan(scores["auroc"])
    assert scores["auroc_undefined_classes"] == 1
    assert [math.isnan(value) for value in scores["auroc_per_class"]] == [False, False, True]
    shown = Classify(CLASSES).table(
        Outcome(probabilities[kept].log(), labels[kept], {"temperature": 1}), scores
    )
    assert "(AUROC is undefined for 1 of 3 classes)" in shown


def test_auroc_is_nan_for_every_class_where_only_one_occurs(predictions):
    probabilities, _ = predictions
    scores = score(probabilities, torch.ones(60, dtype=torch.long))
    assert scores["auroc_undefined_classes"] == 3
    assert 0 < scores["balanced_accuracy"] < 1


def test_auroc_is_nan_where_a_model_has_broken_down(predictions):
    _, labels = predictions
    scores = score(torch.full((60, 3), math.nan), labels)
    assert math.isnan(scores["auroc"])
    assert scores["auroc_undefined_classes"] == 3


def test_classes_that_do_not_occur_leave_balanced_accuracy_alone(predictions):
    probabilities, labels = predictions
    kept = labels != 2
    recall = [(probabilities.argmax(1)[labels == c] == c).float().mean().item() for c in (0, 1)]
    scores = score(probabilities[kept], labels[kept])
    assert scores["balanced_accuracy"] == pytest.approx(sum(recall) / 2)


def test_the_table_is_aligned(predictions):
    outcome = Outcome(predictions[0].log(), predictions[1], {"temperature": 1})
    lines = Classify(CLASSES).table(outcome, score(*predictions)).splitlines()
    assert len({line.index("0.") for line in lines[:6]}) == 1
    header, *rows = lines[-4:]
    assert header.split() == CLASSES
    assert [row.split()[0] for row in rows] == CLASSES
    assert {len(line) for line in lines[-4:]} == {len(header)}


def test_every_class_has_its_sensitivity_specificity_and_precision(predictions):
    probabilities, labels = predictions
    scores, predicted = score(probabilities, labels), probabilities.argmax(1)
    for i in range(3):
        own, named = labels == i, predicted == i
        assert scores["recall_per_class"][i] == pytest.approx(float(named[own].float().mean()))
        assert scores["specificity_per_class"][i] == pytest.approx(float((~named)[~own].float().mean()))
        assert scores["precision_per_class"][i] == pytest.approx(float(own[named].float().mean()))


def test_the_temperature_is_the_one_of_the_lowest_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    labels = torch.distributions.Categorical(logits=logits).sample()
    found = fit_temperature(3 * logits, labels)
    assert found == pytest.approx(3, rel=0.1)

    def loss(temperature):
        return float(torch.nn.functional.cross_entropy(3 * logits / temperature, labels))

    assert loss(found) <= min(loss(found * 1.02), loss(found / 1.02))


def test_the_temperature_stays_within_bounds_and_is_one_for_a_broken_model():
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert fit_temperature(certain, torch.tensor([0, 1])) == pytest.approx(0.1, rel=1e-2)
    assert fit_temperature(certain, torch.tensor([1, 0])) == pytest.approx(10, rel=1e-2)
    assert fit_temperature(certain * math.nan, torch.tensor([1, 0])) == 1


def test_files_hold_null_instead_of_nan():
    value = {"a": [1.0, math.nan], "b": {"c": math.inf}, "d": "nan", "e": 3}
    assert json.loads(json.dumps(without_nan(value), allow_nan=False)) == {
        "a": [1.0, None],
        "b": {"c": None},
        "d": "nan",
        "e": 3,
    }
