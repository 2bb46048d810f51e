"""Several findings: read by a stated policy, learned and scored where they are known."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from predict import main as predict
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from small_training import checked, flags, messages, read, run
from torch.nn.functional import binary_cross_entropy_with_logits
from trainer.errors import TrainerError
from trainer.tasks import Outcome
from trainer.tasks.multilabel import Multilabel, masked_loss, rarest_finding

NAMES = ["edema", "effusion"]


@pytest.fixture(scope="module")
def findings(tmp_path_factory):
    """Folder of 40 images with a bright left half, a bright upper half, both or neither, and their table."""
    folder = tmp_path_factory.mktemp("findings")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        left, upper = i % 2, (i // 2) % 2
        image = rng.integers(0, 60, (16, 16))
        image[:, :8] += 120 * left
        image[:8] += 70 * upper
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{i}.png")
        cell = "|".join(name for name, there in zip(NAMES, (left, upper), strict=True) if there)
        rows.append((f"{i}.png", cell or "No Finding", left, upper))
    table = pd.DataFrame(rows, columns=["path", "label", *NAMES])
    table.to_csv(folder / "table.csv", index=False)
    return folder


def table_of(findings, **cells):
    """The folder's table with the first cells of some columns replaced."""
    table = pd.read_csv(findings / "table.csv", dtype=str)
    for column, values in cells.items():
        table.loc[: len(values) - 1, column] = values
    path = findings / "changed.csv"
    table.to_csv(path, index=False)
    return path


def read_findings(path, **more):
    return read(path, task="multilabel", **more)


def test_one_cell_and_columns_of_their_own_give_the_same(findings):
    cells = read_findings(findings / "table.csv")
    columns = read_findings(findings / "table.csv", finding_column=NAMES)
    assert cells.classes == columns.classes == NAMES
    assert torch.equal(cells.targets, columns.targets)
    assert cells.targets[:4].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({}, [math.nan, math.nan]),
        ({"missing": "negative"}, [0, math.nan]),
        ({"uncertain": "positive"}, [math.nan, 1]),
        ({"uncertain": "negative"}, [math.nan, 0]),
    ],
)
def test_what_empty_and_uncertain_mean_is_a_setting(findings, policy, expected):
    path = table_of(findings, edema=["", "-1"])
    found = read_findings(path, finding_column=NAMES, **policy).targets[:2, 0]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_an_empty_cell_of_all_findings_is_no_label(findings):
    path = table_of(findings, label=["", "No Finding"])
    assert read_findings(path).targets[:2].isnan().tolist() == [[True, True], [False, False]]
    assert read_findings(path, missing="negative").targets[0].tolist() == [0, 0]


def test_a_cell_that_cannot_be_read_is_named(findings):
    path = table_of(findings, edema=["perhaps"])
    with pytest.raises(TrainerError, match="finding 'edema' has the value 'perhaps'"):
        read_findings(path, finding_column=NAMES)


def test_findings_spelled_in_two_ways_are_refused(findings):
    path = table_of(findings, label=["Edema"])
    with pytest.raises(TrainerError, match="'Edema' and 'edema' differ in spelling alone"):
        read_findings(path)


def test_a_finding_without_a_label_is_named(findings):
    path = table_of(findings, edema=[""] * 40)
    assert "Finding 'edema' has no label in any image" in read_findings(path, finding_column=NAMES).notes[-1]


def test_settings_of_other_tasks_are_refused(findings, capsys):
    given = ["--data", findings / "table.csv", "--label-column", "label", "--finding-column", "edema"]
    assert "--finding-column is for --task multilabel" in messages(capsys, *given)
    given += ["--task", "multilabel"]
    assert "--finding-column takes the place of --label-column" in messages(capsys, *given)
    with pytest.raises(TrainerError, match="--balanced-sampler is for"):
        checked(task="multilabel", balanced_sampler=True)


def test_a_class_label_of_several_findings_names_the_task(findings, capsys):
    assert "Take --task multilabel" in messages(capsys, "--data", findings / "table.csv")


def test_a_split_goes_by_the_rarest_finding():
    values = torch.tensor([[1.0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0], [math.nan, 1, 1], [math.nan] * 3])
    assert rarest_finding(values).tolist() == [1, 0, 2, 3, 1, 3]


def test_what_is_not_known_adds_nothing_to_the_loss():
    torch.manual_seed(0)
    logits, targets = torch.randn(6, 2, dtype=torch.double), torch.randint(0, 2, (6, 2)).double()
    targets[1, 0] = targets[4, 1] = math.nan
    known = ~targets.isnan()
    weights = torch.tensor([3.0, 0.5], dtype=torch.double)
    every = binary_cross_entropy_with_logits(
        logits, targets.nan_to_num(), pos_weight=weights, reduction="none"
    )
    expected = every[known].sum() / 10
    assert masked_loss(logits, targets, weights) == pytest.approx(float(expected))
    logits.requires_grad_()
    masked_loss(logits, targets).backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~known] == 0).all()
    assert masked_loss(logits, torch.full_like(targets, math.nan)) == 0


def test_weights_balance_what_is_there():
    targets = torch.tensor([[1.0, 0], [0, math.nan], [0, 1], [0, 1]])
    assert Multilabel(NAMES).weigh(targets).tolist() == [3, 0.5]


@pytest.fixture
def outcome():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 2, (80, 2), generator=generator).float()
    outputs = torch.randn(80, 2, generator=generator) + targets
    targets[:10, 0] = math.nan
    return Outcome(outputs, targets, {"temperature": 1.0, "thresholds": [0.6, 0.5], "rule": "youden"})


def test_scores_equal_those_of_scikit_learn_on_what_is_known(outcome):
    found = Multilabel(NAMES).scores(outcome)
    probabilities = outcome.outputs.sigmoid()
    for place, name in enumerate(NAMES):
        known = ~outcome.targets[:, place].isnan()
        truth, own = outcome.targets[known, place], probabilities[known, place]
        said = own >= outcome.fitted["thresholds"][place]
        scores = found["findings"][name]
        assert scores["labelled"] == int(known.sum())
        assert scores["positive"] == int(truth.sum())
        assert scores["auroc"] == pytest.approx(roc_auc_score(truth, own))
        assert scores["average_precision"] == pytest.approx(average_precision_score(truth, own))
        assert scores["f1"] == pytest.approx(f1_score(truth, said))
        assert scores["sensitivity"] == pytest.approx(float(said[truth == 1].float().mean()))
        assert scores["specificity"] == pytest.approx(float((~said)[truth == 0].float().mean()))
    aurocs = [found["findings"][name]["auroc"] for name in NAMES]
    assert found["auroc"] == pytest.approx(np.mean(aurocs))
    assert Multilabel(NAMES).watch(outcome.outputs, outcome.targets) == pytest.approx(found["auroc"])


def test_an_auroc_that_is_not_defined_is_counted_and_left_out(outcome):
    task = Multilabel(NAMES)
    whole = task.scores(outcome)
    outcome.targets[:, 1] = 0
    found = task.scores(outcome)
    assert found["auroc_undefined_findings"] == 1
    assert math.isnan(found["findings"]["effusion"]["auroc"])
    assert found["auroc"] == whole["findings"]["edema"]["auroc"]
    assert "AUROC is undefined for 1 of 2 findings" in task.table(outcome, found)


def test_thresholds_follow_the_rule_on_what_is_known(outcome):
    found = Multilabel(NAMES).fit_thresholds(outcome, "sensitivity=0.9")["thresholds"]
    probabilities = outcome.outputs.sigmoid()
    for place, threshold in enumerate(found):
        own = probabilities[outcome.targets[:, place] == 1, place]
        called = int((own >= threshold).sum())
        assert called / len(own) >= 0.9 > (called - 1) / len(own)


def test_a_finding_without_cases_has_the_threshold_of_a_half(outcome):
    outcome.targets[:, 0] = 0
    outcome.targets[:, 1] = math.nan
    assert Multilabel(NAMES).fit_thresholds(outcome, "youden")["thresholds"] == [0.5, 0.5]


def test_a_run_learns_and_is_predicted_as_it_was_tested(findings, tmp_path):
    table = findings / "table.csv"
    more = ["--task", "multilabel", "--epochs", "12", "--lr", "0.02", "--class-weights", "--augment", "none"]
    record = run(*flags(table, tmp_path / "run", *more))
    assert record["test"]["auroc"] > 0.9
    low, high = record["test"]["intervals"]["auroc"]
    assert low <= record["test"]["auroc"] <= high
    assert record["images"]["train"].keys() == {*NAMES, "no finding"}
    output = tmp_path / "predictions.csv"
    given = [tmp_path / "run" / "adapter.safetensors", table, "--output", output, "--quiet"]
    assert predict(list(map(str, given))) == 0
    tested = pd.read_csv(tmp_path / "run" / "predictions.csv").set_index("path")
    again = pd.read_csv(output).set_index("path").loc[tested.index]
    for name in NAMES:
        assert again[f"p({name})"].to_numpy() == pytest.approx(tested[f"p({name})"].to_numpy(), abs=1e-5)
        assert again[f"label({name})"].tolist() == tested[f"label({name})"].tolist()
    assert again["prediction"].fillna("").tolist() == tested["prediction"].fillna("").tolist()
