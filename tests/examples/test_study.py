"""A study runs what fits, once, and lays out what it found; wrong flags are answered with what to do."""

import pandas as pd
import pytest
from filelock import FileLock
from study import command as study
from study_runs import imagine

TINY = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32", "--epochs", "2"]
METHODS = ["--method", "full", "linear_probe", "ssf"]


@pytest.fixture
def asked(monkeypatch):
    """Runs that end at once with scores that follow from their settings; those that began."""
    return imagine(monkeypatch)


def test_a_comparison_runs_every_row_on_every_seed_and_writes_its_results(asked, tmp_path, capsys):
    given = ["compare", *TINY, *METHODS, "--seed", "0", "1", "--output", str(tmp_path)]
    assert study.main(given) == 0
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert set(scores["label"]) == {"full-frozen", "full-adapt", "linear_probe", "ssf"}
    assert scores["mean"].is_monotonic_decreasing
    assert set(scores["runs"]) == {2}
    assert len(asked) == 8
    assert all(settings.quiet and settings.epochs == 2 for settings in asked)
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert len(runs) == 8
    assert sorted(runs["run"]) == sorted(path.name for path in (tmp_path / "runs").iterdir())
    text = (tmp_path / "report.html").read_text()
    assert "study.py compare --model test_efficientnet" in text
    assert "8 of 8 runs; seeds 0, 1; at most 2 epochs" in text
    said = capsys.readouterr().out
    assert "On tissue with test_efficientnet, " in said
    assert "Caution: 2 runs a row are few." in said
    # The same again, and one seed more: only what is missing is run.
    assert study.main(given) == 0
    assert len(asked) == 8
    assert study.main([*given[:-4], "0", "1", "2", *given[-2:]]) == 0
    assert len(asked) == 12


def test_a_model_and_a_data_set_more_are_columns_and_tables(asked, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    data = ["--data", str(tmp_path / "one"), str(tmp_path / "two")]
    given = [
        "compare",
        *TINY[2:],
        "--model",
        "test_efficientnet",
        "test_vit",
        "--method",
        "linear_probe",
        *data,
    ]
    assert study.main([*given, "--seed", "0", "--output", str(tmp_path / "out")]) == 0
    scores = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert sorted(zip(scores["model"], scores["data"], strict=True)) == [
        ("test_efficientnet", "one"),
        ("test_efficientnet", "two"),
        ("test_vit", "one"),
        ("test_vit", "two"),
    ]


def test_learning_rates_are_found_by_validation_and_their_settings_asked_for_again(asked, tmp_path):
    given = ["compare", *TINY, "--seed", "0", "--output", str(tmp_path)]
    assert (
        study.main([*given, "--method", "linear_probe", "--lr-factors", "0.3", "1", "--lr-epochs", "1"]) == 0
    )
    assert [(settings.lr, settings.epochs) for settings in asked] == [
        (0.0009, 1),
        (0.003, 1),
        (0.01, 1),
        (0.003, 2),
    ]
    settings = tmp_path / "settings" / "test_efficientnet-tissue" / "linear_probe.yaml"
    assert study.main([*given, "--method", "--config", str(settings)]) == 0
    assert len(asked) == 4


def test_rates_are_tried_on_seeds_of_their_own(asked, tmp_path):
    given = ["--method", "linear_probe", "--lr-factors", "0.3", "1", "--lr-seed", "7", "8", "--seed", "0"]
    assert study.main(["compare", *TINY, *given, "--output", str(tmp_path)]) == 0
    tried = [(settings.seed, settings.lr) for settings in asked]
    assert tried[:4] == [(7, 0.0009), (8, 0.0009), (7, 0.003), (8, 0.003)]
    assert tried[-1] == (0, 0.003)
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [1]
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert runs["for"].to_list() == ["rate"] * (len(asked) - 1) + ["test"]
    assert runs.loc[len(asked) - 1, ["row", "seed", "lr", "epochs"]].to_list() == [
        "linear_probe",
        0,
        0.003,
        2,
    ]


def test_of_the_rows_of_a_file_those_of_some_names_are_run(asked, tmp_path):
    rows = "epochs: 2\nrows:\n  half: {method: ssf, depth: 0.5}\n  whole: {method: ssf}\n  lora: {method: lora}\n"
    (tmp_path / "rows.yaml").write_text(rows)
    given = ["compare", *TINY, "--method", "--config", str(tmp_path / "rows.yaml"), "--seed", "0"]
    assert study.main([*given, "--row", "half", "lora", "--output", str(tmp_path)]) == 0
    assert [(settings.method, settings.depth) for settings in asked] == [("ssf", 0.5), ("lora", 1.0)]
    assert set(pd.read_csv(tmp_path / "scores.csv")["label"]) == {"half", "lora"}


def test_a_cross_validation_runs_every_fold(asked, tmp_path):
    given = ["--method", "linear_probe", "--seed", "0", "--k-folds", "3", "--lr-factors", "1"]
    assert study.main(["compare", *TINY, *given, "--output", str(tmp_path)]) == 0
    assert [(settings.k_folds, settings.fold) for settings in asked] == [(3, 0), (3, 1), (3, 2)]
    assert list(pd.read_csv(tmp_path / "scores.csv")["runs"]) == [3]
    assert "3 of 3 runs; seeds 0, each with 3 folds" in (tmp_path / "report.html").read_text()


def test_a_run_that_fails_ends_itself_alone(asked, tmp_path, capsys):
    (tmp_path / "wild.yaml").write_text("method: bias\nlr: 9\n")
    given = ["--method", "linear_probe", "--config", str(tmp_path / "wild.yaml"), "--seed", "0"]
    assert study.main(["compare", *TINY, *given, "--output", str(tmp_path)]) == 1
    assert list(pd.read_csv(tmp_path / "scores.csv")["label"]) == ["linear_probe"]
    said = "bias on test_efficientnet, tissue, seed 0, lr 9 failed: The training loss became nan"
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("fraction", "repeat"), [(1.0, 1), (0.5, 2), (0.05, 20), (0.01, 20)])
def test_an_epoch_goes_through_smaller_shares_more_often_up_to_a_bound(asked, tmp_path, fraction, repeat):
    given = ["volume", *TINY, "--epochs", "6", "--method", "ssf", "--seed", "0", "--fraction", str(fraction)]
    assert study.main([*given, "--output", str(tmp_path)]) == 0
    (settings,) = asked
    assert (settings.train_fraction, settings.epochs, settings.repeat) == (fraction, 6, repeat)


def test_a_study_of_the_number_of_images_writes_all_its_results(asked, tmp_path, capsys):
    given = ["volume", *TINY, "--method", "full", "ssf", "--seed", "0", "1", "--fraction", "1", "0.05"]
    assert study.main([*given, "--output", str(tmp_path)]) == 0
    for name in (
        "volume.md",
        "volume.tex",
        "volume.csv",
        "report.html",
        "volume-test_efficientnet-tissue.png",
    ):
        assert (tmp_path / name).stat().st_size > 100, name
    found = pd.read_csv(tmp_path / "volume.csv").set_index(["label", "fraction"])
    assert len(found) == 6
    assert (
        found.loc[("full-frozen", 0.05), "train_images"]
        < 0.1 * found.loc[("full-frozen", 1.0), "train_images"]
    )
    assert [settings.train_fraction for settings in asked[:6]] == [1.0] * 3 + [0.05] * 3
    assert "On tissue, ssf is " in capsys.readouterr().out
    # The points at 100 % are runs of a comparison too.
    assert study.main(["compare", *given[1:-3], "--output", str(tmp_path)]) == 0
    assert len(asked) == 12


def test_flags_of_the_trainer_go_to_every_run(asked, tmp_path):
    given = [
        "--method",
        "lora",
        "--option",
        "rank=2",
        "--class-weights",
        "--target",
        "conv_stem",
        "--seed",
        "3",
    ]
    assert study.main(["compare", *TINY, *given, "--output", str(tmp_path)]) == 0
    (settings,) = asked
    assert settings.option == {"lora": {"rank": 2}}
    assert settings.class_weights
    assert settings.target == ["conv_stem"]
    assert (settings.seed, settings.no_pretrained) == (3, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--k-folds", "1"], "--k-folds is 1; take at least 2 folds"),
        (["--data", "a/x", "b/x"], "--data has two data sets called x"),
        (["--method", "lra"], "'lra'. Did you mean 'lora'"),
        (["--method", "attention"], "No method fits test_efficientnet"),
        (
            ["--lr-seed", "3"],
            "--lr-seed says where rates are tried, and --lr-factors which",
        ),
        (["--data", "/nowhere"], "--data /nowhere does not exist"),
        (["--devices", "2"], "--devices is 2, and a run trains on one device, which Ray gives it"),
        (["--baseline", "full", "--method", "ssf"], "--baseline full is not among the rows (ssf)"),
        (["--row", "ssf", "half", "--method", "ssf"], "--row half is not among the rows (ssf)"),
        (["--margin", "-1"], "--margin is -1.0; it must be at least 0"),
        (["--fraction", "0"], "--fraction 0 is no share: give numbers above 0 and at most 1"),
        (["--epochs", "0"], "--epochs is 0; it must be above 0"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(asked, capsys, tmp_path, given, message):
    command = "volume" if "--fraction" in given else "compare"
    assert study.main([command, *TINY, *given, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not asked


@pytest.mark.parametrize("given", [["--fold", "1"], ["--quiet"], ["--resume"]])
def test_what_a_study_sets_itself_is_no_flag_of_it(capsys, tmp_path, given):
    with pytest.raises(SystemExit):
        study.main(["compare", *TINY, *given, "--output", str(tmp_path)])
    assert given[0] in capsys.readouterr().err


def test_torchrun_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert study.main(["compare", *TINY, "--output", str(tmp_path)]) == 2
    assert "torchrun would run the whole study in every process" in capsys.readouterr().err


def test_two_studies_in_one_folder_are_refused(asked, capsys, tmp_path):
    with FileLock(tmp_path / "study.lock"):
        assert study.main(["compare", *TINY, *METHODS, "--output", str(tmp_path)]) == 2
    assert f"Another study is at work in {tmp_path}" in capsys.readouterr().err
    assert not asked
