"""A comparison runs what fits, once, survives being killed, and lays out what it found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import compare
from experiments import page
from experiments.cells import Choice, choices, fitting, make_cell
from experiments.figures import draw_pareto, looks_of
from experiments.rates import Row, best_rate, beyond, multiples, tuned
from experiments.records import Records
from experiments.runs import run_cells
from experiments.statistics import Lead, average_ranks, bootstrap_interval, lead_of, macro_f1, pareto_front
from experiments.study import Study
from experiments.summary import across_data, summarise
from experiments.tables import cost_table, detail_table, score_table, to_html, to_latex, to_markdown, write_tables
from trainer.errors import TrainerError
from trainer.metrics import macro_f1 as trainer_macro_f1

import medpeft
from medpeft import registry

EXAMPLES = Path(compare.__file__).parent
TINY = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32", "--epochs", "1", "--train-fraction", "0.2"]


def built_in():
    return {name for name, m in registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}


# The statistics


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
    ("ours", "full", "lead"),
    [
        ([0.6, 0.7, 0.8], [0.4, 0.7, 0.9], Lead(False, 0.1)),
        ([0.6, 0.7, 0.8], [0.4, 0.6, 0.9], Lead(False, 0.1 * 10**0.5)),
        ([0.4, 0.6, 0.9], [0.6, 0.7, 0.8], Lead(True, 0.1 * 10**0.5)),
        ([0.6, 0.7, 0.8], [0.4, 0.6, 0.7], Lead(True)),
        ([0.3, 0.4, 0.5], [0.4, 0.6, 0.7], Lead(False)),
        ([0.6, 0.5, 0.8], [0.5, 0.6, 0.9], Lead(False, 0.01 * 10**0.5)),
        ([0.6, 0.7, 0.9], [0.4, 0.8, 0.9], Lead(False, 0.01 * 10 ** (2 / 3))),
        ([0.6, 0.7, 0.9], [0.6, 0.7, 0.9], None),
    ],
)
def test_the_last_crossing_says_who_leads_and_since_when(ours, full, lead):
    found = lead_of([0.01, 0.1, 1.0], ours, full)
    assert (found and found.ahead) == (lead and lead.ahead)
    assert (found and found.since) == (lead and lead.since and pytest.approx(lead.since))


# The records


def test_a_record_is_there_once_and_survives_a_torn_line(tmp_path):
    records = Records(tmp_path)
    records.append({"key": "a", "value": 1})
    with records.path.open("ab") as file:
        file.write(b'{"key": "b", "val')  # a process was killed here
    assert set(records.read()) == {"a"}
    records.append({"key": "c", "value": float("nan")})
    assert records.read() == {"a": {"key": "a", "value": 1}, "c": {"key": "c", "value": None}}
    assert [json.loads(line)["key"] for line in records.path.read_text().splitlines()] == ["a", "c"]


def test_records_of_several_machines_are_read_together(tmp_path):
    Records(tmp_path, "-1").append({"key": "a"})
    Records(tmp_path, "-2").append({"key": "b"})
    assert set(Records(tmp_path).read()) == {"a", "b"}


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"key": "a"}\nnonsense\n')
    with pytest.raises(TrainerError, match=r"runs\.jsonl, line 2, is no JSON.* Take the line out; its run is done again"):
        Records(tmp_path).read()


# The cells


def test_every_registered_method_that_fits_is_compared_and_the_others_are_named():
    rows, left_out = fitting(choices(None, []), TINY[2:], "test_efficientnet")
    labels = [row.label for row in rows]
    assert labels[:2] == ["full", "linear_probe"]
    assert {"tsa", "ssf", "lora", "bn", "bias"} <= set(labels)
    assert left_out["bitfit"] == "trains the same parameters of test_efficientnet as bias"
    assert "found nothing to train in EfficientNet" in left_out["attention"]
    assert built_in() <= {*labels, *left_out}


def test_a_registered_method_of_ones_own_is_compared_too(own_registry):
    @medpeft.register("mine")
    def mine(name, parameter, layer):
        """The stem."""
        return name.startswith("conv_stem")

    rows, _ = fitting(choices(None, []), [], "test_efficientnet")
    assert "mine" in [row.label for row in rows]


def test_a_wrong_name_or_option_is_an_error_and_no_method_that_does_not_fit():
    with pytest.raises(medpeft.MedpeftError, match=r"Unknown method 'lra'\. Did you mean 'lora'"):
        fitting(choices(["lra"], []), [], "test_efficientnet")
    with pytest.raises(medpeft.MedpeftError, match=r"Unknown option 'rnk'\. Did you mean 'rank'"):
        fitting(choices(["lora"], []), ["--option", "rnk=4"], "test_efficientnet")


def test_files_of_settings_take_the_place_of_their_method(tmp_path):
    for name, text in (("one", "method: ssf"), ("frozen", "method: full\nbatchnorm: frozen"), ("adapt", "method: full")):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [tmp_path / f"{name}.yaml" for name in ("one", "frozen", "adapt")]
    rows = choices(["linear_probe", "ssf", "bias+norm"], files)
    assert [row.label for row in rows] == ["frozen", "adapt", "linear_probe", "ssf", "bias+norm"]
    assert rows[3].flags == ("--config", str(files[0]))
    assert [row.label for row in choices([], files)] == ["frozen", "adapt", "ssf"]


def test_a_file_without_a_method_is_refused(tmp_path):
    (tmp_path / "rate.yaml").write_text("lr: 0.001")
    with pytest.raises(TrainerError, match=r"rate\.yaml names no method\. Add a line such as 'method: ssf'"):
        choices(None, [tmp_path / "rate.yaml"])


def test_a_key_follows_the_settings_and_not_the_place(tmp_path):
    def key(*flags, folder=tmp_path, seed=0, choice=("--method", "ssf")):
        return make_cell(list(flags), None, "test_efficientnet", Choice("row", choice), seed, folder).key

    config = tmp_path / "settings.yaml"
    config.write_text("method: ssf\n")
    same = [key(), key("--quiet"), key(folder=tmp_path / "other"), key(choice=("--config", str(config)))]
    assert len(set(same)) == 1
    config.write_text("method: ssf\nlr: 0.1\n")
    others = [key("--lr", "0.1"), key(seed=1), key("--patience", "1"), key("--epochs", "3")]
    assert len({*same, *others}) == 5
    assert key(choice=("--config", str(config))) == others[0]


# The learning rates


def validated(lr, score, loss=1.0):
    return {"settings": {"lr": lr}, "val": {"macro_f1": score}, "val_loss": loss}


def test_the_rate_with_the_best_validation_score_is_taken():
    runs = [(0.1, 0.5, 1.0), (0.2, 0.7, 0.9), (0.3, 0.7, 0.8), (0.4, 0.6, 0.1)]
    assert best_rate([validated(*run) for run in runs]) == 0.3


def test_a_rate_is_judged_by_its_mean_over_the_seeds_and_one_that_failed_comes_last():
    lucky, steady, failed = [(0.1, 0.9), (0.1, 0.2)], [(0.2, 0.6), (0.2, 0.7)], [(0.3, 0.95)]
    assert best_rate([validated(*run) for run in lucky + steady + failed]) == 0.2
    assert best_rate([validated(*run) for run in failed]) == 0.3


def test_candidate_rates_are_multiples():
    assert multiples(0.003, [3, 0.3, 1]) == [0.0009, 0.003, 0.009]
    row = Row(None, "test_efficientnet", Choice("ssf", ("--method", "ssf")))
    assert row.at(0.009).choice.flags == ("--method", "ssf", "--lr", "0.009")
    assert row.at(0.009, epochs=2).choice.flags[-2:] == ("--epochs", "2")


@pytest.fixture
def imagined(monkeypatch):
    """A function that lets runs end at once, with scores that it is told."""
    monkeypatch.setattr("experiments.runs.images_of", lambda args: None)

    def install(score_of):
        def run_cell(cell, images):
            scores = {"test": {"macro_f1": 0.5}, "val": {"macro_f1": score_of(cell)}, "val_loss": 1.0}
            return {"key": cell.key, "settings": vars(cell.args), **scores}

        monkeypatch.setattr("experiments.runs.run_cell", run_cell)
        monkeypatch.setattr("experiments.runs.Records.append", lambda self, record: RECORDED.setdefault(record["key"], record))
        monkeypatch.setattr("experiments.runs.Records.read", lambda self: RECORDED)

    RECORDED: dict = {}
    return install


def tuned_rates(folder, rows, *given):
    """The labels with the rates that a search took, and the study."""
    parser = compare.make_parser("", str(folder))
    compare.declare_rate_flags(parser)
    study = Study.of(*compare.parse(parser, [*TINY, "--output", str(folder), *given]))
    return {row.choice.label: row.cell(study, 0).args.lr for row in tuned(study, rows)}, study


def rows_of(*methods):
    return [Row(None, "test_efficientnet", Choice(m, ("--method", m))) for m in methods]


def test_a_search_over_seeds_takes_another_rate_than_one_on_the_first(tmp_path, imagined):
    table = {0.0009: (0.9, 0.1), 0.003: (0.7, 0.7), 0.009: (0.6, 0.6), 0.00027: (0.2, 0.2)}
    imagined(lambda cell: table[cell.args.lr][cell.args.seed])
    given = ["--seed", "0", "1", "--lr-factors", "0.3", "1", "3"]
    assert tuned_rates(tmp_path, rows_of("ssf"), *given)[0] == {"ssf": 0.0009}
    assert tuned_rates(tmp_path, rows_of("ssf"), *given, "--lr-seeds", "2")[0] == {"ssf": 0.003}


def test_a_row_for_which_no_rate_works_does_not_end_the_others(tmp_path, imagined):
    def score(cell):
        if cell.label == "lora":
            raise TrainerError("The training loss became nan")
        return 0.5

    imagined(score)
    found, study = tuned_rates(tmp_path, rows_of("ssf", "lora"), "--lr-factors", "1")
    assert found == {"ssf": 0.003}
    assert [(cell.label, reason) for cell, reason in study.failed] == [("lora", "The training loss became nan")]


@pytest.mark.parametrize(("best", "further"), [(0.009, 0.027), (0.0009, 0.00027), (0.003, None)])
def test_a_best_rate_at_the_edge_of_the_grid_asks_for_one_further_out(best, further):
    assert beyond([0.003, 0.0009, 0.009], best) == further
    assert beyond([best], best) is None


# Tables and pictures


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
    runs = [record("full", "one_set", 0, strong), record("full", "one_set", 1, middle), record("full", "other", 0, weak)]
    runs += [record("bias+norm", "one_set", s, middle) for s in (0, 1)] + [record("bias+norm", "other", 0, middle)]
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
    save = compare.draw_pareto.__globals__["Figure"].savefig

    def keep(figure, *given, **options):
        drawn.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(compare.draw_pareto.__globals__["Figure"], "savefig", keep)
    draw_pareto(summary[summary["data"] == "one_set"], "a model on one set", tmp_path / "picture.png")
    (figure,) = drawn
    assert [t.get_text().split()[0] for t in figure.legends[0].get_texts()] == ["full", "bias+norm", "lora"]
    assert [axes.get_xlabel() for axes in figure.axes] == list(compare.draw_pareto.__globals__["COSTS"].values())
    box = figure.get_window_extent()
    for text in [*figure.legends[0].get_texts(), *(label for axes in figure.axes for label in axes.get_xticklabels())]:
        extent = text.get_window_extent()
        assert extent.x1 <= box.x1
        assert extent.y0 >= box.y0
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 10


def test_a_page_escapes_what_is_not_its_own(tmp_path):
    page.write_page(tmp_path / "page.html", "a <b>", [page.section("<i>", page.listed(["x < y"]), page.command('"<"'))])
    text = (tmp_path / "page.html").read_text()
    assert "<b>" not in text
    assert "<i>" not in text
    assert "x &lt; y" in text


# Whole comparisons


METHODS = ["--method", "full", "linear_probe"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted comparison of two methods and two seeds on the default data."""
    output = tmp_path_factory.mktemp("finished")
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(output)]) == 0
    return output


def test_a_comparison_writes_all_its_results(finished):
    for name in ("scores.md", "scores.tex", "scores.csv", "report.html", "runs.jsonl", "pareto-test_efficientnet-tissue.png"):
        assert (finished / name).stat().st_size > 100, name
    scores = pd.read_csv(finished / "scores.csv")
    assert list(scores["label"]) == ["full", "linear_probe"]
    assert list(scores["runs"]) == [2, 2]
    assert scores["saved_mib"].notna().all()
    assert scores["step_ms"].notna().all()
    assert scores["auroc"].between(0, 1).all()
    assert "### test_efficientnet on tissue: other scores" in (finished / "scores.md").read_text()
    assert not list(finished.glob("runs/*/last.ckpt"))
    assert len(list(finished.glob("runs/*/adapter.safetensors"))) == 4


def test_the_report_needs_nothing_but_itself(finished):
    text = (finished / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 1
    for outside in ("http:", "https:", "<script", "<link", 'src="/', 'src="p'):
        assert outside not in text, outside


def test_finished_runs_are_not_run_again(finished, monkeypatch, capsys):
    monkeypatch.setattr("experiments.runs.run_cell", lambda *_: pytest.fail("a recorded run was run again"))
    before = (finished / "scores.csv").read_text()
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(finished)]) == 0
    assert (finished / "scores.csv").read_text() == before
    assert "4 of 4 runs" in capsys.readouterr().out


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def test_a_comparison_killed_twice_gives_the_same_table(finished, tmp_path):
    command = [sys.executable, EXAMPLES / "compare.py", *TINY, *METHODS, "--seed", "0", "1", "--output", tmp_path]
    records = tmp_path / "runs.jsonl"
    for lines in (1, 2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        # Killed after some runs are recorded and while another is under way.
        wait_for(lambda n=lines: records.exists() and len(records.read_bytes().splitlines()) >= n, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
        assert not (tmp_path / "scores.md").exists()
    assert compare.run([*TINY, *METHODS, "--seed", "0", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "scores.md").read_text() == (finished / "scores.md").read_text()
    assert (tmp_path / "scores.tex").read_text() == (finished / "scores.tex").read_text()
    assert len(records.read_bytes().splitlines()) == 4


def test_learning_rates_are_found_by_validation_and_written_for_other_scripts(tmp_path):
    given = ["--method", "linear_probe", "--seed", "0", "--lr-factors", "0.1", "1", "--output", str(tmp_path)]
    assert compare.run([*TINY, *given]) == 0
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    rates = [run["settings"]["lr"] for run in runs]
    assert rates[:2] == [0.0003, 0.003]
    assert len(rates) == len(set(rates)) <= 4  # two beyond the edge at most; the final run is one of the trials
    best = max(runs, key=lambda run: (run["val"]["macro_f1"], -run["val_loss"]))
    settings = tmp_path / "settings" / "test_efficientnet-tissue" / "linear_probe.yaml"
    assert pd.read_csv(tmp_path / "scores.csv")["lr"][0] == best["settings"]["lr"]
    assert compare.run([*TINY, "--method", "--config", str(settings), "--seed", "0", "--output", str(tmp_path)]) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(runs)  # the file asks for a run that is there


def test_a_run_that_fails_ends_itself_alone(tmp_path, capsys):
    (tmp_path / "wild.yaml").write_text("method: full\nlr: 1.0e+30\n")
    given = ["--method", "linear_probe", "--config", str(tmp_path / "wild.yaml"), "--seed", "0", "--output", str(tmp_path)]
    assert compare.run([*TINY, *given]) == 1
    assert list(pd.read_csv(tmp_path / "scores.csv")["label"]) == ["linear_probe"]
    assert "full on test_efficientnet, tissue, seed 0 failed: The training loss became" in capsys.readouterr().out


# Several processes, several devices


def cells_in(folder, count):
    return [make_cell(TINY, None, "test_efficientnet", Choice("ssf", ("--method", "ssf")), s, folder) for s in range(count)]


@pytest.fixture
def slow_runs(monkeypatch):
    """Runs that take a moment and train nothing; the keys of those that began."""
    begun = []

    def run_cell(cell, images):
        begun.append(cell.key)
        time.sleep(0.2)
        return {"key": cell.key, "test": {"macro_f1": 0.5}}

    monkeypatch.setattr("experiments.runs.images_of", lambda args: None)
    monkeypatch.setattr("experiments.runs.run_cell", run_cell)
    return begun


def test_the_same_command_started_twice_shares_the_runs(tmp_path, slow_runs):
    cells, records = cells_in(tmp_path, 5), Records(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        failed = list(pool.map(lambda _: run_cells(cells, records), range(2)))
    assert failed == [[], []]
    assert sorted(slow_runs) == sorted(cell.key for cell in cells), "a run was done twice or not at all"
    assert set(records.read()) == set(slow_runs)


def test_a_run_whose_process_died_is_taken_over(tmp_path, slow_runs):
    cells, records = cells_in(tmp_path, 2), Records(tmp_path)
    cells[0].args.output.mkdir(parents=True)
    script = "import filelock, sys, time; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True)"
    script += "; time.sleep(60)"
    command = [sys.executable, "-c", script, cells[0].args.output / "run.lock"]
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    other.stdout.read(1)
    with ThreadPoolExecutor(1) as pool:
        ours = pool.submit(run_cells, cells, records)
        wait_for(records.read, other)
        assert slow_runs == [cells[1].key]
        other.kill()
        other.communicate()
        assert ours.result() == []
    assert slow_runs == [cells[1].key, cells[0].key]


def test_a_run_on_two_devices_has_processes_of_its_own(tmp_path):
    given = ["--method", "linear_probe", "--seed", "0", "--devices", "2", "--accelerator", "cpu", "--output", str(tmp_path)]
    assert compare.run([*TINY, *given]) == 0
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [1]


@pytest.mark.parametrize(
    "said", ["a warning\ntrain.py: the batch does not divide\nmore", "Traceback\nthe batch does not divide\n"]
)
def test_a_run_that_fails_in_its_own_processes_is_told_of(tmp_path, capsys, monkeypatch, said):
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2, stderr=said))
    given = ["--method", "linear_probe", "--seed", "0", "--devices", "2", "--accelerator", "cpu", "--output", str(tmp_path)]
    assert compare.run([*TINY, *given]) == 1
    assert ": failed. the batch does not divide\n" in capsys.readouterr().out


def test_shards_share_the_runs(tmp_path):
    given = [*TINY, "--method", "linear_probe", "--seed", "0", "1", "--output", str(tmp_path)]
    assert compare.run([*given, "--shard", "2/2"]) == 0
    assert len((tmp_path / "runs-2.jsonl").read_text().splitlines()) == 1
    assert compare.run([*given, "--shard", "1/2"]) == 0
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [2]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--resume"], "--resume is set already"),
        (["--data", "a/x", "b/x"], "--data has two data sets called x"),
        (["--method", "lra"], "Unknown method 'lra'. Did you mean 'lora'"),
        (["--method", "attention"], "No method fits test_efficientnet"),
        (["--shard", "1/2", "--lr-factors", "1"], "--shard cannot be combined with --lr-factors"),
        (["--seed", "0", "1", "--lr-factors", "1", "--lr-seeds", "3"], "--lr-seeds is 3; it must be from 1 to 2"),
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(capsys, tmp_path, given, message):
    assert compare.main([*TINY, *given, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_torchrun_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main([*TINY, "--output", str(tmp_path)]) == 2
    assert "torchrun would run the whole study in every process" in capsys.readouterr().err


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs Chromium")
def test_the_report_opens_in_a_browser_with_its_picture(finished, tmp_path):
    # The page reports on itself: how many rows there are, and how wide the picture is that was decoded.
    text = (finished / "report.html").read_text()
    probe = (
        "<script>addEventListener('load', () => { document.title = [...document.images].map(i => i.naturalWidth)"
        " + ' ' + document.querySelectorAll('tbody tr').length + ' ' + (document.body.scrollWidth <= innerWidth) })</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", probe + "</body>"))
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    flags += " --disable-sync --disable-quic --window-size=1000,800 --virtual-time-budget=5000 --dump-dom"
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    command = [browser, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path / 'page.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    width, rows, fits = done.stdout.partition("<title>")[2].partition("</title>")[0].split()
    assert int(width) > 1000
    assert (rows, fits) == ("6", "true")  # three tables of two methods
