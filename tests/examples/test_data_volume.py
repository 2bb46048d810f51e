"""Scores against the amount of data: nested shares, curves, and where they cross that of full fine-tuning."""

import json
from functools import partial

import data_volume
import numpy as np
import pandas as pd
import pytest
import yaml
from experiments.cells import Choice
from experiments.statistics import Lead
from experiments.summary import leads
from experiments.tables import lead_text, volume_table
from PIL import Image

TINY = [
    "--model",
    "test_efficientnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--epochs",
    "1",
    "--batch-size",
    "64",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    given = ["--method", "full", "linear_probe", "--fraction", "1", "0.05", "--seed", "0", "--stretch", "2"]
    assert data_volume.run([*TINY, *given, "--output", str(output)]) == 0
    return output


def test_a_whole_run_writes_all_its_results(finished):
    for name in (
        "volume.md",
        "volume.tex",
        "volume.csv",
        "report.html",
        "volume-test_efficientnet-tissue.png",
    ):
        assert (finished / name).stat().st_size > 100, name
    found = pd.read_csv(finished / "volume.csv").set_index(["label", "fraction"])
    assert len(found) == 4
    assert found.loc[("full", 0.05), "train_images"] < 0.1 * found.loc[("full", 1.0), "train_images"]
    assert (finished / "report.html").read_text().count("data:image/png;base64,") == 1
    assert np.asarray(Image.open(finished / "volume-test_efficientnet-tissue.png").convert("L")).std() > 10


def test_finished_shares_are_not_run_again_and_more_can_be_added(finished, capsys):
    given = ["--method", "full", "linear_probe", "--fraction", "1", "0.05", "--seed", "0", "--stretch", "2"]
    assert data_volume.run([*TINY, *given, "--output", str(finished)]) == 0
    assert "[" not in capsys.readouterr().out.partition("###")[0]


@pytest.mark.parametrize(
    ("fraction", "epochs", "patience"), [(1.0, "6", "5"), (0.5, "12", "10"), (0.01, "24", "20")]
)
def test_smaller_shares_have_more_epochs_up_to_a_bound(fraction, epochs, patience):
    row = data_volume.on_share(["--epochs", "6"], Choice("ssf", ("--method", "ssf")), fraction, 4.0)
    share = ("--train-fraction", str(fraction), "--epochs", epochs, "--patience", patience)
    assert row == Choice("ssf", ("--method", "ssf", *share))


def summary(scores):
    rows = [
        {
            "label": label,
            "fraction": fraction,
            "mean": mean,
            "sd": 0.01,
            "low": mean - 0.1,
            "high": mean + 0.1,
        }
        for label, means in scores.items()
        for fraction, mean in zip((0.01, 0.1, 1.0), means, strict=True)
    ]
    return pd.DataFrame(rows).assign(train_images=lambda d: (500 * d["fraction"]).astype(int))


def test_where_each_method_is_ahead_is_found_and_tabled():
    scores = {
        "full": [0.4, 0.7, 0.9],
        "ssf": [0.6, 0.7, 0.8],
        "lora": [0.5, 0.8, 0.95],
        "bn": [0.3, 0.6, 0.91],
        "bias": [0, 0, 0],
    }
    found = summary(scores)
    where = leads(found, "full")
    assert where["ssf"] == Lead(ahead=True, crossings=(pytest.approx(0.1),))
    assert where["lora"] == Lead(ahead=True)
    assert where["bn"] == Lead(ahead=False, crossings=(pytest.approx(0.1 ** (0.01 / 0.11)),))
    assert where["bias"] == Lead(ahead=False)
    assert lead_text(Lead(ahead=True, crossings=(0.016, 0.63))) == "ahead until 1.6 %, from 63 %"
    text, best = volume_table(found, where, "full")
    assert list(text["Against full"]) == ["–", "ahead until 10 %", "ahead", "ahead from 81 %", "behind"]
    assert text.columns[0] == "1 % (5 images)"
    assert list(best["100 % (500 images)"]) == [False, False, True, False, False]


def test_without_full_fine_tuning_or_a_second_share_there_is_nothing_to_be_ahead_of():
    assert leads(summary({"ssf": [0.6, 0.7, 0.8]}), "full") == {}
    both = summary({"full": [0.4, 0.7, 0.9], "ssf": [0.6, 0.7, 0.8]})
    assert leads(both[both["fraction"] == 1], "full") == {}


@pytest.mark.parametrize(
    ("scores", "height", "said"),
    [([0.6, 0.7, 0.8], 0.75, "ahead until 32 %"), ([0.3, 0.5, 1.0], 0.75, "ahead from 32 %")],
)
def test_where_two_curves_cross_is_marked(tmp_path, monkeypatch, scores, height, said):
    drawn = []
    figure_class = data_volume.draw_volume.__globals__["Figure"]
    monkeypatch.setattr(figure_class, "savefig", lambda figure, path: drawn.append(figure))
    found = summary({"full": [0.4, 0.6, 0.9], "ssf": scores})
    data_volume.draw_volume(found, leads(found, "full"), "full", "title", tmp_path / "x.png")
    (figure,) = drawn
    marks = [
        point
        for line in figure.axes[0].lines
        if line.get_marker() == "X"
        for point in line.get_xydata().tolist()
    ]
    assert marks == [pytest.approx([0.1 * 10**0.5, height])]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["crosses full", "full", f"ssf  ({said})"]


def test_every_share_has_a_learning_rate_of_its_own(tmp_path, monkeypatch):
    def run_cell(cell, images):
        """The best rate is 0.009 on a tenth and 0.003 on the whole."""
        best = {0.1: 0.009, 1.0: 0.003}[cell.args.train_fraction]
        score = 0.5 - abs(np.log(cell.args.lr / best)) / 10
        return {
            "key": cell.key, "model": cell.model, "data": cell.data, "label": cell.label, "seed": cell.args.seed,
            "settings": vars(cell.args), "images": {"train": {"a": 9}}, "trainable": 9, "val_loss": 1.0,
            "val": {"macro_f1": score}, "test": {"macro_f1": score, "confusion_matrix": [[5, 1], [2, 4]]},
        }  # fmt: skip

    monkeypatch.setattr("experiments.runs.images_of", lambda args: None)
    monkeypatch.setattr("experiments.runs.run_cell", run_cell)
    monkeypatch.setattr("experiments.records.json.dumps", partial(json.dumps, default=str))
    given = [
        "--method",
        "ssf",
        "--baseline",
        "ssf",
        "--fraction",
        "0.1",
        "1",
        "--seed",
        "0",
        "--lr-factors",
        "0.3",
        "1",
    ]
    assert data_volume.run([*TINY, *given, "--output", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "volume.csv").set_index("fraction")
    assert found["lr"].to_dict() == {1.0: 0.003, 0.1: 0.01}  # two rates beyond the edge: 0.01 and 0.0333
    assert "| ssf | 0.01 | 0.003 |" in (tmp_path / "volume.md").read_text()
    settings = tmp_path / "settings"
    assert yaml.safe_load((settings / "test_efficientnet-tissue-0.1" / "ssf.yaml").read_text())["lr"] == 0.01
    assert yaml.safe_load((settings / "test_efficientnet-tissue" / "ssf.yaml").read_text())["lr"] == 0.003


def test_wrong_shares_are_answered_with_what_to_do(capsys, tmp_path):
    assert data_volume.main([*TINY, "--fraction", "0", "--output", str(tmp_path)]) == 2
    assert "--fraction 0 is no share: give numbers above 0 and at most 1" in capsys.readouterr().err
    assert data_volume.main([*TINY, "--method", "ssf", "--output", str(tmp_path)]) == 2
    assert "--baseline full is not among the rows (ssf)" in capsys.readouterr().err
