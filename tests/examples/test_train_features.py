"""Cached features are computed once, and train the same head."""

import pytest
from small_training import draw_stripes, flags, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("stripes"))


def test_features_are_computed_once_and_train_the_same_head(folder, tmp_path, capsys, monkeypatch):
    given = ["--method", "linear_probe", "--lr", "0.05", "--epochs", "3"]
    cache = ["--cache-features", str(tmp_path / "features")]
    slow = run(*flags(folder, tmp_path / "slow", *given, "--augment", "none"))
    first = run(*flags(folder, tmp_path / "first", *given, *cache))
    assert "Computed the features of 40 images" in capsys.readouterr().out
    # The second run sees no image: neither the model nor its batches are asked for one.
    monkeypatch.setattr("trainer.features._compute", None)
    second = run(*flags(folder, tmp_path / "second", *given, *cache, "--lr", "0.2"))
    assert "Took the features of 40 images" in capsys.readouterr().out
    losses = [[epoch["train_loss"] for epoch in record["history"]] for record in (slow, first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-3)
    assert first["test"]["macro_f1"] == slow["test"]["macro_f1"]
    assert losses[0][-1] < losses[0][0]


def test_features_of_another_size_are_others(folder, tmp_path):
    cache = ["--method", "linear_probe", "--cache-features", str(tmp_path / "features"), "--epochs", "1"]
    for size in ("32", "40"):
        run(*flags(folder, tmp_path / size, *cache, "--image-size", size))
    assert len(list((tmp_path / "features").iterdir())) == 2
