"""The places of a run are switched off and scored; the best of them are a command."""

import json
import shlex
from itertools import pairwise

import attribute
import pandas as pd
import pytest
from PIL import Image
from small_training import flags, parsed, run


@pytest.fixture(scope="module")
def finished(stripes, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "ssf"
    run(*flags(stripes, output, "--method", "ssf", "--target", "blocks.*"))
    return output


def test_it_writes_a_table_and_a_picture_and_names_the_best_places(finished, capsys):
    assert attribute.main([str(finished), "--resamples", "5", "--share", "0.25"]) == 0
    places = pd.read_csv(finished / "places.csv")
    metrics = json.loads((finished / "metrics.json").read_text())
    printed = capsys.readouterr().out
    assert f"validation macro-F1 {metrics['best_val_score']:.4f}" in printed
    assert list(places.columns) == ["place", "methods", "parameters", "loss", "low", "high", "unscored"]
    assert places["loss"].is_monotonic_decreasing
    assert (places["low"] <= places["loss"]).all()
    with Image.open(finished / "places.png") as picture:
        assert picture.width > 500
    words = shlex.split(printed.splitlines()[-1])
    targets = [after for word, after in pairwise(words) if word == "--target"]
    named = max(1, min(round(len(places) / 4), (places["loss"] > 0).sum()))
    assert targets == list(places["place"][:named])
    again = parsed(*words[2:]).checked().plain()
    assert again == metrics["settings"] | {"target": targets, "output": again["output"]}


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
    assert attribute.main([str(tmp_path)]) == 2
    assert "has no metrics.json" in capsys.readouterr().err
