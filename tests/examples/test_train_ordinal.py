"""Grades: in an order, learned by conditional probabilities that never contradict each other."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from predict import main as predict
from sklearn.metrics import cohen_kappa_score, f1_score
from small_training import flags, read, run
from torch.nn.functional import binary_cross_entropy_with_logits
from trainer.errors import TrainerError
from trainer.scripts.grades import above_each, grades_of, probabilities_of
from trainer.tasks import Outcome
from trainer.tasks.ordinal import Ordinal, conditional_loss, number_grades


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Folder of images in three shades, from dark to light, 15 of each, and their table."""
    folder = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(45):
        noise = rng.integers(0, 40, (16, 16))
        Image.fromarray((noise + 80 * (i % 3)).astype(np.uint8)).save(folder / f"{i}.png")
        rows.append((f"{i}.png", str(i % 3), ("none", "mild", "severe")[i % 3]))
    pd.DataFrame(rows, columns=["path", "label", "word"]).to_csv(folder / "table.csv", index=False)
    return folder


def test_grades_are_numbers_or_are_given_in_order(shades):
    table = shades / "table.csv"
    numbers = read(table, task="ordinal")
    words = read(table, task="ordinal", label_column="word", grade=["none", "mild", "severe"])
    assert numbers.classes == ["0", "1", "2"]
    assert words.classes == ["none", "mild", "severe"]
    assert torch.equal(numbers.targets, words.targets)
    with pytest.raises(TrainerError, match="'none' is no number, so the grades have no order"):
        read(table, task="ordinal", label_column="word")
    with pytest.raises(TrainerError, match="'severe' is none of the grades none, mild"):
        read(table, task="ordinal", label_column="word", grade=["none", "mild"])


def test_ten_is_above_two():
    labels, grades = number_grades(["10", "2", "0", "2"], [])
    assert grades == ["0", "2", "10"]
    assert labels.tolist() == [2, 1, 0, 1]


def test_the_loss_is_that_of_the_paper():
    torch.manual_seed(0)
    logits, grades = torch.randn(9, 3, dtype=torch.double), torch.arange(9) % 4
    total, count = 0.0, 0
    for logit, grade in zip(logits, grades, strict=True):
        for place in range(3):
            if grade >= place:
                above = torch.tensor(float(grade > place), dtype=torch.double)
                total += float(binary_cross_entropy_with_logits(logit[place], above))
                count += 1
    assert conditional_loss(logits, grades) == pytest.approx(total / count)


def test_probabilities_fall_from_grade_to_grade_and_add_up():
    logits = torch.randn(50, 4)
    above, each = above_each(logits), probabilities_of(logits)
    assert (above[:, 1:] <= above[:, :-1]).all()
    assert torch.allclose(each.sum(1), torch.ones(50))
    assert (each >= 0).all()
    assert torch.equal(grades_of(logits), (above > 0.5).sum(1))


def test_scores_equal_those_of_scikit_learn():
    torch.manual_seed(0)
    outcome = Outcome(torch.randn(60, 2), torch.randint(0, 3, (60,)), {"temperature": 1.0})
    found = Ordinal(["0", "1", "2"]).scores(outcome)
    predicted = grades_of(outcome.outputs)
    expected = cohen_kappa_score(outcome.targets, predicted, weights="quadratic")
    assert found["kappa"] == pytest.approx(expected)
    assert found["mae"] == pytest.approx(float((predicted - outcome.targets).abs().float().mean()))
    assert found["macro_f1"] == pytest.approx(f1_score(outcome.targets, predicted, average="macro"))
    assert np.trace(found["confusion_matrix"]) == int((predicted == outcome.targets).sum())


def test_a_run_learns_and_is_predicted_as_it_was_tested(shades, tmp_path):
    more = ["--task", "ordinal", "--epochs", "12", "--lr", "0.02"]
    record = run(*flags(shades / "table.csv", tmp_path / "run", *more))
    assert record["test"]["kappa"] > 0.7
    output = tmp_path / "predictions.csv"
    given = [tmp_path / "run" / "adapter.safetensors", shades / "table.csv", "--output", output, "--quiet"]
    assert predict(list(map(str, given))) == 0
    tested = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("path")
    again = pd.read_csv(output).set_index("path").loc[tested.index]
    assert (again["prediction"] == tested["prediction"]).all()
    for grade in "012":
        assert again[f"p({grade})"].to_numpy() == pytest.approx(tested[f"p({grade})"].to_numpy(), abs=1e-5)
