"""What is run, at which learning rate: the methods that fit, each once, under a key that follows its settings."""

import compare
import pytest
from experiments.cells import Choice, Split, choices, fitting, make_cell
from experiments.rates import Row, best_rate, beyond, multiples, tuned
from experiments.study import Study
from trainer.errors import TrainerError

import medpeft
from medpeft.adapters import registry

TINY = [
    "--model",
    "test_efficientnet",
    "--no-pretrained",
    "--image-size",
    "32",
    "--epochs",
    "1",
    "--train-fraction",
    "0.2",
]


def built_in():
    return {name for name, m in registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}


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
    for name, text in (
        ("one", "method: ssf"),
        ("frozen", "method: full\nbatchnorm: frozen"),
        ("adapt", "method: full"),
    ):
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
        return make_cell(
            list(flags), None, "test_efficientnet", Choice("row", choice), Split(seed), folder
        ).key

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
        monkeypatch.setattr(
            "experiments.runs.Records.append", lambda self, record: RECORDED.setdefault(record["key"], record)
        )
        monkeypatch.setattr("experiments.runs.Records.read", lambda self: RECORDED)

    RECORDED: dict = {}
    return install


def tuned_rates(folder, rows, *given):
    """The labels with the rates that a search took, and the study."""
    parser = compare.make_parser("", str(folder))
    compare.declare_rate_flags(parser)
    study = Study.of(*compare.parse(parser, [*TINY, "--output", str(folder), *given]))
    return {row.choice.label: row.cell(study, Split(0)).args.lr for row in tuned(study, rows)}, study


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
    assert [(cell.label, reason) for cell, reason in study.failed] == [
        ("lora", "The training loss became nan")
    ]


@pytest.mark.parametrize(("best", "further"), [(0.009, 0.027), (0.0009, 0.00027), (0.003, None)])
def test_a_best_rate_at_the_edge_of_the_grid_asks_for_one_further_out(best, further):
    assert beyond([0.003, 0.0009, 0.009], best) == further
    assert beyond([best], best) is None
