"""What is run, at which settings: the methods that fit, each once, in a folder that follows its settings."""

from dataclasses import replace

import pytest
import yaml
from study import rates as rate_search
from study.cluster import Machines, fit
from study.rates import best_rate, beyond, multiples, tuned
from study.summary import Record
from study.trials import Row, fitting, make_trial, rows_of, settings_of, write_settings
from trainer.errors import TrainerError

import medpeft
from medpeft.adapters import registry

TINY = {
    "model": "test_efficientnet",
    "no_pretrained": True,
    "image_size": 32,
    "epochs": 1,
    "train_fraction": 0.2,
}


def row(method, **more):
    return Row(method, {"method": method, **more})


def built_in():
    return {name for name, m in registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}


def test_every_registered_method_that_fits_is_compared_and_the_others_are_named():
    rows, left_out = fitting(rows_of(None, [], {}), TINY)
    labels = [row.label for row in rows]
    assert labels[:3] == ["full-frozen", "full-adapt", "linear_probe"]
    assert {"tsa", "ssf", "lora", "bn", "bias"} <= set(labels)
    assert left_out["bitfit"] == "trains the same parameters of test_efficientnet as bias"
    assert "found nothing to train in EfficientNet" in left_out["attention"]
    assert built_in() - {"full"} <= {*labels, *left_out}


def test_full_fine_tuning_stands_twice_with_both_policies_of_batchnorm_where_there_are_two():
    asked = rows_of(["ssf", "full"], [], {})
    rows, _ = fitting(asked, TINY)
    assert [row.label for row in rows] == ["ssf", "full-frozen", "full-adapt"]
    assert [settings_of(row, TINY).batchnorm for row in rows[1:]] == ["frozen", "adapt"]
    assert [row.label for row in fitting(asked, TINY | {"batchnorm": "frozen"})[0]] == ["ssf", "full"]
    assert [row.label for row in fitting(asked, TINY | {"model": "test_vit"})[0]] == ["ssf", "full"]


def test_a_registered_method_of_ones_own_is_compared_too(own_registry):
    @medpeft.register("mine")
    def mine(name, parameter, layer):
        """The stem."""
        return name.startswith("conv_stem")

    rows, _ = fitting(rows_of(None, [], {}), TINY)
    assert "mine" in [row.label for row in rows]


def test_a_wrong_name_or_option_is_an_error_and_no_method_that_does_not_fit():
    with pytest.raises((TrainerError, medpeft.MedpeftError), match=r"'lra'.*'lora'"):
        fitting([row("lra")], TINY)
    with pytest.raises((TrainerError, medpeft.MedpeftError), match=r"'rnk'.*'rank'"):
        fitting([row("lora", option={"rnk": 4})], TINY)


def test_files_of_settings_take_the_place_of_their_method_and_given_settings_win(tmp_path):
    for name, text in (
        ("one", "method: ssf\nepochs: 7\nlr: 0.5"),
        ("frozen", "method: full\nbatchnorm: frozen"),
        ("adapt", "method: full"),
    ):
        (tmp_path / f"{name}.yaml").write_text(text)
    files = [tmp_path / f"{name}.yaml" for name in ("one", "frozen", "adapt")]
    rows = rows_of(["linear_probe", "ssf", "bias+norm"], files, {"epochs": 2})
    assert [row.label for row in rows] == ["linear_probe", "bias+norm", "ssf", "frozen", "adapt"]
    assert rows[2].settings == {"method": "ssf", "epochs": 2, "lr": 0.5}
    assert [row.label for row in rows_of([], files, {})] == ["ssf", "frozen", "adapt"]


def test_a_file_may_name_many_rows_that_share_its_other_settings(tmp_path):
    file = tmp_path / "rows.yaml"
    file.write_text("epochs: 3\nrows:\n  half: {method: ssf, depth: 0.5}\n  ssf: {method: ssf, epochs: 4}\n")
    rows = rows_of(["ssf", "bias"], [file], {"epochs": 2})
    assert [row.label for row in rows] == ["bias", "half", "ssf"]
    assert rows[1].settings == {"method": "ssf", "depth": 0.5, "epochs": 2}
    assert [row.settings["epochs"] for row in rows_of([], [file], {})] == [3, 4]
    kept, left_out = fitting(rows, TINY)
    assert (len(kept), left_out) == (3, {})


def test_two_rows_of_one_name_are_refused(tmp_path):
    (tmp_path / "rows.yaml").write_text("rows:\n  bias: {method: ssf}\n")
    with pytest.raises(TrainerError, match="Two rows are called bias"):
        rows_of(["bias"], [tmp_path / "rows.yaml"], {})


def test_places_of_a_run_hold_from_any_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = make_trial(row("ssf", depth=0.5, cache_features="kept"), TINY, tmp_path).settings
    assert settings.cache_features == tmp_path / "kept"
    (tmp_path / "images").mkdir()
    places = {"data": "images", "test_data": "images", "weights": "own.pth"}
    settings = make_trial(row("ssf", **places), TINY, tmp_path).settings
    assert settings.data == settings.test_data == str(tmp_path / "images")
    assert settings.weights == tmp_path / "own.pth"
    assert make_trial(row("ssf", data="hf:mine"), TINY, tmp_path).settings.data == "hf:mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lr: 0.001", r"rate\.yaml names no method for rate\. Add a line such as 'method: ssf'"),
        ("method: ssf\nlearning: 1", r"rate\.yaml has 'learning', which is no setting of train\.py"),
        ("method: [", r"rate\.yaml could not be read"),
    ],
)
def test_a_file_that_is_none_of_settings_is_refused(tmp_path, text, message):
    (tmp_path / "rate.yaml").write_text(text)
    with pytest.raises(TrainerError, match=message):
        rows_of(None, [tmp_path / "rate.yaml"], {})


def test_a_runs_folder_follows_its_settings_and_not_the_place(tmp_path):
    def folder(place=tmp_path, **settings):
        return make_trial(row("ssf", **settings), TINY, place).folder

    assert folder().parent == tmp_path / "runs"
    assert folder().name == folder(tmp_path / "other").name
    others = [
        folder(lr=0.1),
        folder(seed=1),
        folder(patience=1),
        folder(epochs=3),
        folder(train_fraction=0.5),
    ]
    assert len({folder(), *others}) == 6


def test_what_a_row_trains_with_can_be_read_again(tmp_path):
    settings = settings_of(row("lora", option={"rank": 3}, lr=0.02, seed=5, augment="none"), TINY)
    write_settings(settings, tmp_path / "settings" / "lora.yaml")
    content = yaml.safe_load((tmp_path / "settings" / "lora.yaml").read_text())
    assert not {"data", "seed", "output", "quiet"} & set(content)
    (again,) = rows_of([], [tmp_path / "settings" / "lora.yaml"], {})
    assert replace(settings_of(again, {}), seed=5).digest() == settings.digest()


# The learning rates


def validated(lr, score, loss=1.0):
    history = [{"val_loss": loss}]
    metrics = {"settings": {"lr": lr}, "best_val_score": score, "best_epoch": 1, "history": history}
    return Record("ssf", "a_model", "one_set", metrics, None)


def test_the_rate_with_the_best_validation_score_is_taken():
    runs = [(0.1, 0.5, 1.0), (0.2, 0.7, 0.9), (0.3, 0.7, 0.8), (0.4, 0.6, 0.1)]
    assert best_rate([validated(*run) for run in runs]) == 0.3


def test_a_rate_is_judged_by_its_mean_over_the_seeds_and_one_that_failed_comes_last():
    lucky, steady, failed = [(0.1, 0.9), (0.1, 0.2)], [(0.2, 0.6), (0.2, 0.7)], [(0.3, 0.95)]
    assert best_rate([validated(*run) for run in lucky + steady + failed]) == 0.2
    assert best_rate([validated(*run) for run in failed]) == 0.3


def test_candidate_rates_are_multiples():
    assert multiples(0.003, [3, 0.3, 1]) == [0.0009, 0.003, 0.009]


@pytest.mark.parametrize(("best", "further"), [(0.009, 0.027), (0.0009, 0.00027), (0.003, None)])
def test_a_best_rate_at_the_edge_of_the_grid_asks_for_one_further_out(best, further):
    assert beyond([0.003, 0.0009, 0.009], best) == further
    assert beyond([best], best) is None


@pytest.fixture
def imagined(monkeypatch):
    """A function that lets runs end at once, with validation scores that it is told; None for a failure."""

    def install(score_of):
        records, asked = {}, []

        def run_all(trials, machines):
            failed = {}
            for trial in trials:
                asked.append(trial.settings)
                score = score_of(trial)
                if score is None:
                    failed[trial.folder] = "The training loss became nan"
                else:
                    records[trial.folder] = validated(trial.settings.lr, score)
            return failed

        monkeypatch.setattr(rate_search, "run_all", run_all)
        monkeypatch.setattr("study.trials.Trial.finished", lambda self: self.folder in records)
        monkeypatch.setattr("study.trials.Trial.record", lambda self: records[self.folder])
        return asked

    return install


SEEDS = [{"seed": 0}, {"seed": 1}]


def rates(folder, rows, factors, tries):
    found, missing, tried = tuned(rows, TINY, factors, tries, folder, Machines())
    assert {trial.label for trial in tried} == {row.label for row in rows}
    return {row.label: row.settings["lr"] for row in found}, missing


def test_a_search_over_seeds_takes_another_rate_than_one_on_the_first(tmp_path, imagined):
    table = {0.0009: (0.9, 0.1), 0.003: (0.7, 0.7), 0.009: (0.6, 0.6), 0.00027: (0.2, 0.2)}
    imagined(lambda trial: table[trial.settings.lr][trial.settings.seed])
    assert rates(tmp_path, [row("ssf")], [0.3, 1, 3], SEEDS[:1])[0] == {"ssf": 0.0009}
    assert rates(tmp_path, [row("ssf")], [0.3, 1, 3], SEEDS)[0] == {"ssf": 0.003}
    written = yaml.safe_load(
        (tmp_path / "settings" / "test_efficientnet-tissue-0.2" / "ssf.yaml").read_text()
    )
    assert written["lr"] == 0.003


def test_rates_are_tried_for_fewer_epochs_where_that_is_asked_for(tmp_path, imagined):
    asked = imagined(lambda trial: 0.5)
    rates(tmp_path, [row("ssf")], [1], [{"seed": 0, "epochs": 3}])
    assert {settings.epochs for settings in asked} == {3}


def test_each_share_has_a_learning_rate_of_its_own_and_at_most_two_beyond_the_grid(tmp_path, imagined):
    best = {0.1: 0.9, 1.0: 0.003}
    asked = imagined(lambda trial: -abs(trial.settings.lr - best[trial.settings.train_fraction]))
    shares = [row("ssf", train_fraction=0.1), row("ssf", train_fraction=1.0)]
    found, _, _ = tuned(shares, {}, [0.3, 1, 3], SEEDS[:1], tmp_path, Machines())
    assert [row.settings["lr"] for row in found] == [0.081, 0.003]
    assert sorted({settings.lr for settings in asked if settings.train_fraction == 0.1}) == [
        0.0009,
        0.003,
        0.009,
        0.027,
        0.081,
    ]


def test_a_row_for_which_no_rate_works_does_not_end_the_others(tmp_path, imagined):
    imagined(lambda trial: None if trial.label == "lora" else 0.5)
    found, missing = rates(tmp_path, [row("ssf"), row("lora")], [1], SEEDS[:1])
    assert found == {"ssf": 0.003}
    assert len(missing) == 1
    assert missing[0].startswith("lora on test_efficientnet, tissue")
    assert missing[0].endswith("failed: The training loss became nan")


def test_what_ends_ray_itself_is_said_with_what_to_do():
    class Broken:
        def fit(self):
            raise RuntimeError("1 worker(s) were killed due to the node running low on memory.\nMore.")

    with pytest.raises(
        TrainerError, match=r"low on memory\. What is finished is kept, and the same command goes"
    ):
        fit(Broken())
