"""A quantity: read as numbers, learned in standard deviations, scored and written in its own unit."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from predict import main as predict
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score
from small_training import flags, read, run
from trainer.errors import TrainerError
from trainer.tasks import Outcome
from trainer.tasks.regress import Regress, fifths


@pytest.fixture(scope="module")
def brightness(tmp_path_factory):
    """Folder of 40 images and the table of their brightness, in units of a thousand."""
    folder = tmp_path_factory.mktemp("brightness")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        level = rng.integers(0, 200)
        Image.fromarray((level + rng.integers(0, 40, (16, 16))).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append((f"{i}.png", f"{1000 * level}"))
    pd.DataFrame(rows, columns=["path", "label"]).to_csv(folder / "table.csv", index=False)
    return folder


def write(folder, labels):
    table = pd.read_csv(folder / "table.csv", dtype=str)
    table.loc[: len(labels) - 1, "label"] = labels
    table.to_csv(folder / "changed.csv", index=False, sep=";")
    return folder / "changed.csv"


def test_numbers_are_read_with_either_decimal_point(brightness):
    images = read(write(brightness, ["1,5", "2.5"]), task="regress")
    assert images.targets[:2].tolist() == [1.5, 2.5]
    assert images.classes == ["label"]


@pytest.mark.parametrize("label", ["old", "inf", "nan5"])
def test_a_label_that_is_no_number_is_named(brightness, label):
    with pytest.raises(TrainerError, match=f"'{label}' is no finite number"):
        read(write(brightness, [label]), task="regress")


def test_a_quantity_that_does_not_vary_is_refused(brightness):
    with pytest.raises(TrainerError, match="Every label is 3"):
        read(write(brightness, ["3"] * 40), task="regress")


def test_a_split_goes_by_fifths():
    assert np.bincount(fifths(np.random.default_rng(0).normal(size=100))).tolist() == [20] * 5
    # Many equal values fall into one.
    assert fifths(np.array([0.0] * 90 + [1.0] * 10)).tolist() == [0] * 90 + [4] * 10
    assert len(fifths(np.zeros(10))) == 10


def test_the_loss_has_no_unit():
    task = Regress(["age"]).prepared(torch.tensor([20.0, 40, 60]))
    more = Regress(["age"]).prepared(torch.tensor([20000.0, 40000, 60000]))
    outputs = torch.tensor([[0.5], [-1.0]])
    targets = torch.tensor([50.0, 30])
    assert task.loss(outputs, targets, None) == pytest.approx(float(more.loss(outputs, 1000 * targets, None)))


def test_scores_equal_those_of_scikit_learn_in_the_unit_of_the_labels():
    torch.manual_seed(0)
    targets = 40 + 10 * torch.randn(50)
    task = Regress(["age"]).prepared(targets)
    outputs = ((targets - task.center) / task.scale + 0.3 * torch.randn(50))[:, None]
    outcome = Outcome(outputs, targets, task.fit(outputs, targets))
    predicted = task.predictions(outputs, outcome.fitted)["prediction"]
    found = task.scores(outcome)
    assert found["mae"] == pytest.approx(mean_absolute_error(targets, predicted))
    assert found["r2"] == pytest.approx(r2_score(targets, predicted), abs=1e-5)
    assert found["spearman"] == pytest.approx(spearmanr(targets, predicted).statistic)
    assert task.watch(outputs, targets) == pytest.approx(found["r2"], abs=1e-5)


def test_scores_that_are_not_defined_are_nan():
    task = Regress(["age"])
    fitted = {"center": 0.0, "scale": 1.0}
    assert math.isnan(task.scores(Outcome(torch.ones(1, 1), torch.ones(1), fitted))["r2"])
    assert math.isnan(task.scores(Outcome(torch.full((3, 1), math.nan), torch.arange(3.0), fitted))["mae"])


def test_an_interval_holds_the_truth_as_often_as_it_promises():
    generator = torch.Generator().manual_seed(0)
    targets = 40 + 10 * torch.randn(900, generator=generator)
    task = Regress(["age"])
    outputs = (targets + 3 * torch.randn(900, generator=generator))[:, None]
    val, test = Outcome(outputs[:300], targets[:300], {}), Outcome(outputs[300:], targets[300:], {})
    val.fitted = task.fit(val.outputs, val.targets)
    test.fitted = val.fitted | task.fit_sets(val, 0.9)
    scores = task.scores(test)
    assert scores["interval_coverage"] == pytest.approx(0.9, abs=0.05)
    # 1.645 standard deviations to either side
    assert test.fitted["interval"]["half_width"] == pytest.approx(4.93, abs=0.5)
    predicted = task.predictions(test.outputs, test.fitted)
    inside = (predicted["low"] <= targets[300:].numpy()) & (targets[300:].numpy() <= predicted["high"])
    assert inside.mean() == pytest.approx(scores["interval_coverage"])
    assert "holds it in" in task.table(test, scores)


def test_too_few_validation_images_give_no_interval():
    task = Regress(["age"])
    outcome = Outcome(torch.randn(5, 1), torch.arange(5.0), {"center": 0.0, "scale": 1.0})
    outcome.fitted = {**outcome.fitted, **task.fit_sets(outcome, 0.9)}
    assert "low" not in task.predictions(outcome.outputs, outcome.fitted)
    assert "5 validation images are too few" in task.table(outcome, task.scores(outcome))


def test_a_run_learns_and_is_predicted_as_it_was_tested(brightness, tmp_path):
    more = ["--task", "regress", "--epochs", "15", "--patience", "15", "--lr", "0.02", "--augment", "none"]
    record = run(*flags(brightness / "table.csv", tmp_path / "run", *more))
    assert record["test"]["r2"] > 0.5
    output = tmp_path / "predictions.csv"
    adapter = tmp_path / "run" / "adapter.safetensors"
    given = [adapter, brightness / "table.csv", "--output", output, "--quiet"]
    assert predict(list(map(str, given))) == 0
    tested = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("path")
    again = pd.read_csv(output).set_index("path").loc[tested.index]
    assert again["prediction"].to_numpy() == pytest.approx(tested["prediction"].to_numpy(), rel=1e-4)
    assert again["label"].tolist() == tested["label"].tolist()
