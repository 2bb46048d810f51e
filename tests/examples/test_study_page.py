"""The tables, pictures and the page show every number once, the best first, and answer their title."""

import shutil
import subprocess

import pandas as pd
import pytest
from study.page import Page, answer, cautions, volume_answers, write_comparison, write_volume
from study.summary import AHEAD, BEHIND, LEVEL, UNCLEAR, summarise
from study.tables import cost_table, detail_table, image_table, score_table, volume_table, write_tables
from study_runs import volume
from test_study_summary import MIDDLE, STRONG, WEAK, record


def runs_of(labels, seeds=(0, 1), **more):
    kinds = {
        "full-frozen": MIDDLE,
        "full-adapt": WEAK,
        "bias+norm": MIDDLE,
        "ssf": STRONG,
        "linear_probe": WEAK,
    }
    runs = [record(label, seed, kinds[label], **more) for seed in seeds for label in labels]
    for run in runs:
        run.metrics["best_val_score"] += 0.1 * (run.label == "full-frozen")
    return runs


@pytest.fixture(scope="module")
def done():
    return runs_of(["full-adapt", "full-frozen", "bias+norm", "ssf", "linear_probe"])


@pytest.fixture(scope="module")
def summary(done):
    runs = [*done, record("ssf", 0, WEAK, data="other"), record("full-frozen", 0, MIDDLE, data="other")]
    return summarise(runs, "full-frozen", draws=200)


def test_the_table_holds_score_interval_difference_average_and_rank(summary):
    table = score_table(summary)
    assert table.text.index[0] == "ssf"
    assert table.text.loc["ssf", "Macro-F1 on one_set"].startswith("0.960 ± 0.000 [")
    assert table.text.loc["ssf", "Macro-F1 on other"].startswith("0.600 [")
    assert table.text.loc["bias+norm", "Macro-F1 on other"] == "–"
    assert table.text.loc["ssf", "Against full-frozen on one_set"].startswith("+0.160 [")
    assert table.text.loc["ssf", "Against full-frozen on one_set"].endswith("] ▲")
    assert table.text.loc["ssf", "Against full-frozen on other"].startswith("−0.200 [")
    assert table.text.loc["full-frozen", "Against full-frozen on one_set"] == "–"
    assert table.text["Average"].to_dict() | {"linear_probe": "–"} == table.text["Average"].to_dict()
    assert table.text.loc[["ssf", "full-frozen"], "Average rank"].to_list() == ["1.5", "1.8"]
    assert table.text.loc["linear_probe", "Trainable"] == "1,200"
    assert table.best.loc["ssf", "Macro-F1 on one_set"]
    assert table.best.loc["full-frozen", ["Macro-F1 on other", "Average"]].all()
    assert not table.best.loc["linear_probe"].any()


def test_rows_of_one_data_set_are_in_the_order_of_their_scores_without_ranks(done):
    table = score_table(summarise(done, draws=100))
    assert table.text.index[0] == "ssf"
    assert set(list(table.text.index)[-2:]) == {"full-adapt", "linear_probe"}
    assert list(table.text.columns) == ["Macro-F1 on one_set", "Against full-frozen", "Trainable"]


def test_the_best_are_bold_in_every_format(summary):
    table = score_table(summary)
    assert "| ssf | **0.960 ± 0.000 [" in table.to_markdown()
    latex = table.to_latex()
    assert r"one\_set" in latex
    assert r"\textbf{0.960 $\pm$ 0.000 [" in latex
    assert r"\toprule" in latex
    assert r"$\uparrow$" in latex
    assert not {"±", "−", "▲", "▼", "–"} & set(latex)
    html = table.to_html()
    assert html.count("<tr") == 6
    assert "font-weight: bold" in html


def test_names_are_escaped_in_every_format():
    table = image_table({"train": {"a|b": 1, "<i>": 2, "c_d": 1234}})
    assert "| a\\|b | 1 |" in table.to_markdown()
    assert "&lt;i&gt;" in table.to_html()
    assert r"c\_d" in table.to_latex()


def test_the_other_scores_are_tabled_and_the_lowest_error_is_the_best(done):
    table = detail_table(summarise([*done[:5], *runs_of(["ssf"], seeds=[1])], draws=50))
    assert table.text.loc["ssf"].to_dict() == {
        "Balanced accuracy": "–", "AUROC, one vs rest": "–", "Average precision": "–", "MCC": "0.480 ± 0.000",
        "Calibration error": "0.150 ± 0.071",
    }  # fmt: skip
    assert table.text.loc["bias+norm", "MCC"] == "0.400"
    assert list(table.best["MCC"][table.best["MCC"]].index) == ["ssf"]
    assert not table.best.loc["ssf", "Calibration error"]
    assert not table.best["AUROC, one vs rest"].any()


def test_the_worst_class_and_the_calibration_before_the_temperature_are_tabled_where_they_are_known():
    runs = runs_of(["full-frozen", "ssf"])
    for place, run in enumerate(runs):
        run.metrics["test"]["recall_per_class"] = [0.9, None, 0.5 + place / 10]
        run.metrics["test"]["calibration_error_untempered"] = 0.2
    table = detail_table(summarise(runs, draws=50))
    assert table.text.loc["ssf", "Recall of the worst class"] == "0.700 ± 0.141"
    assert table.text.loc["ssf", "Calibration error before the temperature"] == "0.200 ± 0.000"
    assert table.best["Recall of the worst class"].to_dict() == {"ssf": True, "full-frozen": False}


def test_depth_and_options_of_a_row_are_tabled_where_one_has_any():
    runs = runs_of(["full-frozen", "ssf"], seeds=[0])
    assert not {"Depth", "Options"} & set(cost_table(summarise(runs, draws=50)).text)
    runs[1].metrics["settings"] |= {"depth": 0.5, "option": {"ssf": {"init": "x"}}, "cache_features": "kept"}
    text = cost_table(summarise(runs, draws=50)).text
    assert text.loc["ssf", ["Depth", "Options"]].to_list() == ["0.5", "init=x, features kept"]
    assert text.loc["full-frozen", ["Depth", "Options"]].to_list() == ["1", "–"]


def test_what_runs_cost_is_tabled_with_their_learning_rate(summary):
    text = cost_table(summary[summary["data"] == "one_set"]).text
    assert text.loc["bias+norm"].to_dict() == {
        "Learning rate": "0.001", "Trainable": "900", "Kept for backward (MiB)": "10", "Peak memory (MiB)": "–",
        "Step (ms)": "90", "Run (s)": "5",
    }  # fmt: skip


def test_images_are_counted_by_class_and_part():
    text = image_table({"train": {"a": 1200, "b": 3}, "test": {"a": 4, "b": 5}}).text
    assert text.loc["all"].to_dict() == {"train": "1,203", "test": "9"}


def test_the_csv_holds_every_number_unrounded(summary, tmp_path):
    write_tables({"a_model": score_table(summary)}, summary, tmp_path, "scores")
    read = pd.read_csv(tmp_path / "scores.csv")
    assert len(read) == 7
    assert read["mean"][0] == summary["mean"][0]
    assert {"runs", "low", "high", "saved_mib", "step_ms", "lr", "train_images", "verdict"} <= set(
        read.columns
    )


def test_the_sentence_names_what_is_ahead_level_behind_and_unclear(done):
    unclear = [record("lora", seed, MIDDLE, order=seed) for seed in (0, 1)]
    rows = summarise([*done, *unclear], draws=200)
    assert answer(rows) == (
        "On one_set with a_model, ssf is ahead of full fine-tuning (full-frozen, macro-F1 0.800); bias+norm is level with "
        "it (within 0.02); full-adapt and linear_probe are behind it; lora is not to be told from it."
    )
    assert answer(rows[rows["verdict"] == BEHIND]).startswith(
        "On one_set with a_model, full-adapt and linear_probe are behind full fine-tuning (full-frozen"
    )
    alone = summarise(runs_of(["ssf"]), draws=50)
    assert answer(alone) == "On one_set with a_model, there is nothing to compare ssf (macro-F1 0.960) with."


def test_few_seeds_are_cautioned_of():
    assert cautions(summarise(runs_of(["ssf"], seeds=range(5)), draws=50)) == []
    (text,) = cautions(summarise(runs_of(["ssf"], seeds=range(4)), draws=50))
    assert text.startswith("Caution: 4 runs a row are few.")
    (text,) = cautions(summarise(runs_of(["ssf"], seeds=[0]), draws=50))
    assert text.startswith("Caution: One run a row is few.")


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        (
            [AHEAD, AHEAD, BEHIND],
            "ahead of full with 1 % and 10 % and behind it with 100 % of the images; it falls behind between 10 % and 100 %.",
        ),
        (
            [BEHIND, BEHIND, AHEAD],
            "ahead of full with 100 % and behind it with 1 % and 10 % of the images; it overtakes it between 10 % and 100 %.",
        ),
        ([UNCLEAR] * 3, "not to be told from full with 1 %, 10 % and 100 % of the images."),
    ],
)
def test_where_a_method_is_ahead_is_said_only_where_intervals_tell(verdicts, said):
    assert volume_answers(volume(verdicts)) == [f"On one_set, ssf is {said}"]


def test_shares_are_tabled_with_their_images_and_signs():
    table = volume_table(volume([AHEAD, LEVEL, BEHIND]))
    assert list(table.text.columns) == ["1 % (5 images)", "10 % (50 images)", "100 % (500 images)"]
    assert [text[-1] for text in table.text.loc["ssf"]] == ["▲", "≈", "▼"]
    assert list(table.text.index) == ["ssf", "full"]


# The page


def test_a_comparison_writes_all_its_results(done, tmp_path):
    page = Page("Which method?", "study.py compare '<b>'", "10 runs", ["oft: <does not fit>"])
    assert "### a_model on one_set: other scores" in write_comparison(done, page, tmp_path)
    for name in (
        "scores.md",
        "scores.tex",
        "scores.csv",
        "report.html",
        "pareto-a_model-one_set-trainable.png",
    ):
        assert (tmp_path / name).stat().st_size > 100, name
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ssf is ahead of full fine-tuning" in text
    assert "Caution: 2 runs a row are few." in text
    assert "oft: &lt;does not fit&gt;" in text
    assert "<b>" not in text
    assert text.count("data:image/png;base64,") == 3
    for outside in ("http:", "https:", "<script", "<link", 'src="/', 'src="p'):
        assert outside not in text, outside


def test_a_study_of_the_number_of_images_writes_all_its_results(done, tmp_path):
    runs = [*done, *runs_of(["full-frozen", "ssf"], fraction=0.1)]
    write_volume(runs, Page("How many?", "study.py volume", "14 runs"), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "On one_set, ssf is ahead of full-frozen with 10 % and 100 % of the images." in text
    assert text.count("data:image/png;base64,") == 1
    assert (tmp_path / "volume-a_model-one_set.png").stat().st_size > 100
    assert len(pd.read_csv(tmp_path / "volume.csv")) == 7


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 500])
def test_the_page_fits_a_desktop_and_a_phone(done, tmp_path, width):
    # The page reports on itself: how wide each picture is shown, and whether it scrolls sideways.
    write_comparison(done, Page("Which method?", "study.py compare", "10 runs"), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    probe = "<script>addEventListener('load', () => { document.title = [...document.images].map(i => i.naturalWidth ? "
    probe += "i.width : 0).join(' ') + ' ' + (document.documentElement.scrollWidth <= innerWidth) })</script>"
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync "
    )
    flags += f"--disable-component-update --window-size={width},800 --virtual-time-budget=5000 --dump-dom"
    command = [
        BROWSER,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        f"file://{tmp_path / 'page.html'}",
    ]
    done_ = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *widths, fits = done_.stdout.partition("<title>")[2].partition("</title>")[0].split()
    assert fits == "true"
    assert len(widths) == 3
    assert min(map(int, widths)) > 400
