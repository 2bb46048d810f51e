"""Starts that look at images: the trainer shows them some of the training part, and a file needs none."""

import csv

import numpy as np
import predict
import pytest
import torch
from small_training import checked, flags, read, run
from trainer.data import starts
from trainer.data.batches import Preprocessing
from trainer.networks.model import check_model
from trainer.work import prepare

MODEL = ("--model", "test_vit", "--method", "lora", "--option", "init=eva", "--option", "rank=2")
PREPROCESSING = Preprocessing((16, 16), 16, [0.0] * 3, [1.0] * 3)


def test_some_training_images_are_shown_as_they_are(stripes, monkeypatch):
    monkeypatch.setattr(starts, "LOOKED_AT", 5)
    monkeypatch.setattr(starts, "AT_ONCE", 2)
    images, rows = read(stripes), np.arange(30)
    settings = checked(seed=1, image_size=16)
    shown = list(starts.batches(images, rows, PREPROCESSING, settings))
    assert [len(batch) for batch in shown] == [2, 2, 1]
    training = PREPROCESSING(images.pixels[:30])
    found = [(training == image).flatten(1).all(1).any() for image in torch.cat(shown)]
    assert all(found)
    again = list(starts.batches(images, rows, PREPROCESSING, settings))
    assert torch.equal(torch.cat(shown), torch.cat(again))
    other = list(starts.batches(images, rows, PREPROCESSING, checked(seed=2, image_size=16)))
    assert not torch.equal(torch.cat(shown), torch.cat(other))
    settings.patch_size = 8
    middles = list(starts.batches(images, rows, PREPROCESSING, settings))
    assert torch.equal(middles[0], shown[0][..., 4:12, 4:12])


def test_only_starts_that_look_at_images_get_any():
    assert starts.looks_at_images({"bias": {}, "lora": {"init": {"blocks.0.*": "eva"}}})
    assert not starts.looks_at_images({"lora": {"init": {"blocks.0.*": "pissa"}}})
    assert not starts.looks_at_images({"ssf": {}})


def test_what_features_are_kept_before_is_found_without_an_image(tmp_path):
    settings = checked(
        model="test_vit2",
        no_pretrained=True,
        image_size=32,
        method="lora",
        option={"init": "eva"},
        depth=0.25,
        cache_features=tmp_path,
    )
    assert check_model(settings) == []


def test_a_run_from_images_begins_there_and_its_file_predicts_and_exports_without_them(stripes, tmp_path):
    output = tmp_path / "eva"
    settings = checked(
        data=str(stripes),
        model="test_vit",
        no_pretrained=True,
        image_size=32,
        method="lora",
        option={"init": "eva", "rank": 2},
    )
    for layer, module in prepare(settings).model.named_modules():
        if layer.endswith("adapters.lora"):
            A = module.down.detach()[:2]  # the directions are orthonormal
            torch.testing.assert_close(A @ A.T, torch.eye(2))

    run(*flags(stripes, output, *MODEL, "--export", "merged", "--quiet"))
    assert (output / "export" / "merged.safetensors").exists()
    given = [output / "adapter.safetensors", stripes, "--output", tmp_path / "all.csv", "--quiet"]
    assert predict.main([str(one) for one in given]) == 0
    found, expected = rows_of(tmp_path / "all.csv"), rows_of(output / "predictions.csv")
    for name, row in expected.items():
        assert float(found[name]["p(across)"]) == pytest.approx(float(row["p(across)"]), abs=1e-5)


def rows_of(path):
    with path.open(newline="") as file:
        return {row["path"]: row for row in csv.DictReader(file)}
