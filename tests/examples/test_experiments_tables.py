"""Tables, pictures and pages show every number once, and the best in bold."""

import numpy as np
import pandas as pd
import pytest
from experiments import figures, page
from experiments.figures import draw_pareto, looks_of
from experiments.statistics import macro_f1
from experiments.summary import across_data, summarise
from experiments.tables import (
    cost_table,
    detail_table,
    score_table,
    to_html,
    to_latex,
    to_markdown,
    write_tables,
)
from PIL import Image


def record(label, data, seed, confusion, model="a_model", **more):
    classes = len(confusion)
    return {
        "key": f"{label} {data} {seed} {model}", "model": model, "data": data, "label": label, "seed": seed,
        "settings": {"lr": 0.001, "train_fraction": 1.0, "epochs": 1, "batch_size": 2, "image_size": 32},
        "images": {"train": dict.fromkeys(range(classes), 50)},
        "test": {"macro_f1": float(macro_f1(confusion)), "confusion_matrix": confusion, "auroc": None, "ece": 0.1 + seed / 10,
                 "mcc": 0.01 * confusion[0][0]}, "val": {"macro_f1": 0.5},
        "trainable": 100 * len(label), "saved_bytes": 2**20 * (1 + len(label)), "step_seconds": 0.01 * len(label), **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def summary():
    weak, middle, strong = [[30, 20], [20, 30]], [[40, 10], [10, 40]], [[48, 2], [2, 48]]
    runs = [
        record("full", "one_set", 0, strong),
        record("full", "one_set", 1, middle),
        record("full", "other", 0, weak),
    ]
    runs += [record("bias+norm", "one_set", s, middle) for s in (0, 1)] + [
        record("bias+norm", "other", 0, middle)
    ]
    return summarise([*runs, record("lora", "one_set", 0, weak)], draws=200)


def test_the_table_holds_mean_deviation_interval_average_and_rank(summary):
    text, best = score_table(summary)
    assert text.loc["full", "one_set"].startswith("0.880 ± 0.113 [")
    assert text.loc["lora", "one_set"].startswith("0.600 [")
    assert text.loc["lora", "other"] == "–"
    assert list(text["Average"]) == ["0.740", "0.800", "–"]
    assert list(text["Average rank"]) == ["1.5", "1.5", "3.0"]
    assert list(text["Trainable"]) == ["400", "900", "400"]
    assert best.loc["full", "one_set"]
    assert best.loc["bias+norm", ["other", "Average", "Average rank"]].all()
    assert not best.loc["lora"].any()


def test_a_ranking_over_data_sets_needs_no_average_for_what_is_missing(summary):
    both = across_data(summary)
    assert np.isnan(both.loc["lora", "average"])
    assert both.loc["lora", "rank"] == 3


def test_the_best_are_bold_in_every_format(summary):
    table = score_table(summary)
    assert "| **0.880 ± 0.113 [" in to_markdown(*table)
    latex = to_latex(*table)
    assert r"one\_set" in latex
    assert r"\textbf{0.880 $\pm$ 0.113 [" in latex
    assert r"\toprule" in latex
    html = to_html(*table)
    assert html.count("<tr") == 4
    assert html.count("<b>") == 5  # a tie on the average rank
    assert "<b>0.880 ± 0.113 [" in html


def test_the_other_scores_are_tabled_and_the_lowest_error_is_the_best(summary):
    text, best = detail_table(summary[summary["data"] == "one_set"])
    assert text.loc["full"].to_dict() == {
        "Balanced accuracy": "–", "AUROC": "–", "Average precision": "–", "MCC": "0.440 ± 0.057",
        "Calibration error": "0.150 ± 0.071",
    }  # fmt: skip
    assert text.loc["lora", "MCC"] == "0.300"
    assert best["MCC"].to_dict() == {"full": True, "bias+norm": False, "lora": False}
    assert best["Calibration error"].to_dict() == {"full": False, "bias+norm": False, "lora": True}
    assert not best["AUROC"].any()


def test_what_runs_cost_is_tabled_with_their_learning_rate(summary):
    text, best = cost_table(summary[summary["data"] == "one_set"])
    assert text.loc["bias+norm"].to_dict() == {
        "Learning rate": "0.001", "Trainable": "900", "Kept for backward (MiB)": "10", "Peak memory (MiB)": "–",
        "Step (ms)": "90", "Run (s)": "–",
    }  # fmt: skip
    assert not best.any(axis=None)


def test_the_csv_holds_every_number_unrounded(summary, tmp_path):
    write_tables({"a_model": score_table(summary)}, summary, tmp_path, "scores")
    read = pd.read_csv(tmp_path / "scores.csv")
    assert len(read) == 5
    assert read["mean"][0] == summary["mean"][0]
    assert {"runs", "low", "high", "saved_mib", "step_ms", "lr", "train_images"} <= set(read.columns)


def test_the_first_forty_methods_look_different():
    looks = looks_of([f"method{i}" for i in range(40)] + ["full"])
    assert len(set(looks.values())) == 41


def test_the_picture_names_every_method_and_nothing_leaves_it(summary, tmp_path, monkeypatch):
    drawn = []
    save = figures.Figure.savefig

    def keep(figure, *given, **options):
        drawn.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(figures.Figure, "savefig", keep)
    draw_pareto(summary[summary["data"] == "one_set"], "a model on one set", tmp_path / "picture.png")
    (figure,) = drawn
    assert [t.get_text().split()[0] for t in figure.legends[0].get_texts()] == ["full", "bias+norm", "lora"]
    assert [axes.get_xlabel() for axes in figure.axes] == list(figures.COSTS.values())
    box = figure.get_window_extent()
    for text in [
        *figure.legends[0].get_texts(),
        *(label for axes in figure.axes for label in axes.get_xticklabels()),
    ]:
        extent = text.get_window_extent()
        assert extent.x1 <= box.x1
        assert extent.y0 >= box.y0
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 10


def test_a_page_escapes_what_is_not_its_own(tmp_path):
    page.write_page(
        tmp_path / "page.html", "a <b>", [page.section("<i>", page.listed(["x < y"]), page.command('"<"'))]
    )
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "x &lt; y" in text
