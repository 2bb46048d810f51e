"""Masks are learned, written in the geometry of their images, and the same again from the adapter's file."""

import csv
import json
from pathlib import Path

import lightning
import numpy as np
import predict
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from small_masks import draw_balls, draw_discs, save
from small_training import checked, parsed, run
from trainer.networks.model import adapted_model, build_model
from trainer.run import run as run_settings

import medpeft

TINY_2D = ["--task", "segment", "--model", "test_efficientnet", "--no-pretrained", "--image-size", "32"]
TINY_UNET = ["--model-option", "channels=[8,16]", "--model-option", "strides=[2]", "--no-pretrained"]
TINY_3D = [
    "--task",
    "segment",
    "--model",
    "monai:UNet",
    *TINY_UNET,
    "--image-size",
    "16",
    "--batch-size",
    "2",
]


@pytest.fixture(scope="module")
def discs(tmp_path_factory):
    return draw_discs(tmp_path_factory.mktemp("discs"))


@pytest.fixture(scope="module")
def learned(discs, tmp_path_factory):
    output = tmp_path_factory.mktemp("parent") / "learned"
    given = ["--data", discs, "--output", output, "--epochs", 8, "--patience", 8, "--lr", "1e-2"]
    return output, run(
        *TINY_2D, *given, "--method", "full", "--batch-size", 4, "--structure", "disc", "--quiet"
    )


def pixels_of(file):
    with Image.open(file) as opened:
        return np.asarray(opened)


def rows_of(file):
    with Path(file).open(newline="") as opened:
        return {row["path"]: row for row in csv.DictReader(opened)}


def same(found, expected):
    assert set(expected) <= set(found)
    for name, row in expected.items():
        for column, value in row.items():
            if column != "path" and value:
                assert float(found[name][column]) == pytest.approx(float(value), abs=2e-3), column


# Two dimensions


def test_a_tiny_set_is_learned(learned):
    output, record = learned
    assert record["test"]["dice"] > 0.75
    assert record["history"][-1]["train_loss"] < 0.5 * record["history"][0]["train_loss"]
    assert record["score"] == "dice"
    low, high = record["test"]["intervals"]["dice"]
    assert low <= record["test"]["dice"] <= high
    assert record["images"]["test"]["disc"] == record["images"]["test"]["all"]
    assert json.loads((output / "metrics.json").read_text())["test"]["unit"] == "px"
    for name in ("training.png", "overlays.png"):
        assert min(pixels_of(output / name).shape[:2]) > 300


def test_the_head_of_an_encoder_is_its_whole_decoder():
    model = adapted_model(
        checked(
            task="segment",
            model="test_efficientnet",
            no_pretrained=True,
            image_size=32,
            method="linear_probe",
        ),
        2,
    )
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder"}
    assert all(p.requires_grad for p in model.decoder.parameters())
    medpeft.check(model.train(), torch.randn(2, 3, 32, 32))


def test_prompts_that_would_stay_among_the_features_are_refused():
    settings = checked(
        task="segment", model="test_vit", no_pretrained=True, image_size=160, method="vpt_shallow"
    )
    with pytest.raises(medpeft.MedpeftError, match="whose outputs the model hands out"):
        adapted_model(settings, 2)


def test_predictions_equal_the_trainers_and_masks_have_the_size_of_the_file(discs, learned, tmp_path):
    output, _ = learned
    assert (
        predict.main([str(output / "adapter.safetensors"), str(discs), "--output", str(tmp_path / "p.csv")])
        == 0
    )
    found = rows_of(tmp_path / "p.csv")
    same(found, rows_of(output / "predictions.csv"))
    for name, row in found.items():
        mask = pixels_of(tmp_path / "p-masks" / name)
        assert mask.shape == (32, 32)
        assert set(np.unique(mask)) <= {0, 255}
        assert (mask > 0).sum() == float(row["area_px(disc)"])


def test_images_of_any_size_without_masks_are_predicted(learned, tmp_path):
    save(np.random.default_rng(0).integers(0, 255, (50, 70)), tmp_path / "in" / "deep" / "x.png")
    given = [
        str(learned[0] / "adapter.safetensors"),
        str(tmp_path / "in"),
        "--output",
        str(tmp_path / "p.csv"),
    ]
    assert predict.main([*given, "--output-masks", str(tmp_path / "m"), "--quiet"]) == 0
    assert pixels_of(tmp_path / "m" / "deep" / "x.png").shape == (50, 70)
    assert set(rows_of(tmp_path / "p.csv")["deep/x.png"]) == {
        "path",
        "area_px(disc)",
        "true_area_px(disc)",
    } - {"true_area_px(disc)"}


def test_unknown_values_in_masks_to_compare_with_are_refused(learned, tmp_path, capsys):
    save(np.zeros((8, 8)), tmp_path / "images" / "a.png")
    save(np.full((8, 8), 3), tmp_path / "masks" / "a.png")
    given = [str(learned[0] / "adapter.safetensors"), str(tmp_path), "--output", str(tmp_path / "p.csv")]
    assert predict.main(given) == 2
    assert "images/a.png has the value 3, and the adapter knows 255" in capsys.readouterr().err


def test_a_table_is_predicted_with_the_masks_that_it_names(discs, learned, tmp_path):
    output, _ = learned
    adapter, found = str(output / "adapter.safetensors"), tmp_path / "p.csv"
    expected = rows_of(output / "predictions.csv")
    tested = [name.rpartition("/")[2] for name in expected]
    lines = [f"{discs}/images/{name},{discs}/masks/{name}" for name in tested]
    (tmp_path / "t.csv").write_text("\n".join(["path,mask", *lines, f"{discs}/images/3.png,none.png"]))
    assert predict.main([adapter, str(tmp_path / "t.csv"), "--output", str(found), "--quiet"]) == 0
    rows = {name.rpartition("/")[2]: row for name, row in rows_of(found).items()}
    same(rows, {name.rpartition("/")[2]: row for name, row in expected.items()})
    if "3.png" not in tested:
        assert rows["3.png"]["dice"] == ""
    (tmp_path / "t.csv").write_text("\n".join(["path", *[line.partition(",")[0] for line in lines]]))
    assert predict.main([adapter, str(tmp_path / "t.csv"), "--output", str(found), "--quiet"]) == 0
    assert all(set(row) == {"path", "area_px(disc)"} for row in rows_of(found).values())


def test_weights_of_a_file_fill_the_encoder_and_another_site_tests_it(discs, tmp_path):
    torch.manual_seed(3)
    state = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    torch.save(state, tmp_path / "w.pth")
    draw_discs(tmp_path / "other", 4)
    given = ["--data", discs, "--epochs", 1, "--weights", tmp_path / "w.pth", "--method", "linear_probe"]
    given = [word for word in [*TINY_2D, *given] if word != "--no-pretrained"]
    more = ["--test-data", tmp_path / "other", "--output", tmp_path / "run", "--quiet", "--no-figures"]
    record = run(*given, *more)
    adapter = str(tmp_path / "run" / "adapter.safetensors")
    arguments = [
        adapter,
        str(tmp_path / "other"),
        "--weights",
        str(tmp_path / "w.pth"),
        "--output",
        str(tmp_path / "p.csv"),
    ]
    assert predict.main([*arguments, "--quiet"]) == 0
    same(rows_of(tmp_path / "p.csv"), rows_of(tmp_path / "run" / "predictions.csv"))
    assert record["images"]["test"]["all"] == 4
    settings = checked(task="segment", model="test_efficientnet", weights=tmp_path / "w.pth", image_size=32)
    model = adapted_model(settings, 2)
    assert torch.equal(model.encoder.conv_stem.weight, state["conv_stem.weight"])


class Cut(lightning.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 1):
            raise RuntimeError("cut")


def test_a_run_cut_off_goes_on_bit_for_bit(discs, tmp_path):
    given = [*TINY_2D, "--data", discs, "--epochs", 2, "--method", "full+lora", "--batch-size", 4]
    given += ["--patch-size", 16, "--augment", "strong", "--quiet", "--no-figures", "--output"]
    whole = run(*given, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="cut"):
        run_settings(parsed(*given, tmp_path / "cut"), callbacks=[Cut()])
    again = run(*given, tmp_path / "cut")
    assert again["test"] == whole["test"]
    losses = [[epoch["train_loss"] for epoch in record["history"]] for record in (whole, again)]
    assert losses[0] == losses[1]
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)


# Three dimensions


def test_volumes_are_predicted_as_trained_and_written_where_they_lie(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    # Axes that go up, to the right and to the front.
    data = draw_balls(tmp_path / "data", axes="SRA")
    given = [*TINY_3D, "--data", data, "--method", "full", "--epochs", 4, "--lr", "1e-2", "--patch-size", 8]
    run(*given, "--output", tmp_path / "run", "--quiet")
    arguments = [
        str(tmp_path / "run" / "adapter.safetensors"),
        str(data),
        "--output",
        str(tmp_path / "p.csv"),
    ]
    assert predict.main([*arguments, "--quiet"]) == 0
    found = rows_of(tmp_path / "p.csv")
    same(found, rows_of(tmp_path / "run" / "predictions.csv"))
    for name, row in found.items():
        image = nibabel.load(data / name)
        mask = nibabel.load(tmp_path / "p-masks" / name)
        truth = np.asarray(
            nibabel.load(data / name.replace("imagesTr", "labelsTr").replace("_0000", "")).dataobj
        )
        assert np.array_equal(mask.affine, image.affine)
        assert mask.get_data_dtype() == np.uint8
        values = np.asarray(mask.dataobj)
        dice = 2 * (values & truth).sum() / (values.sum() + truth.sum())
        assert dice == pytest.approx(float(row["dice(foreground)"]), abs=1e-5)
        assert dice > 0.1
        assert values.sum() * 6 == pytest.approx(float(row["volume_mm3(foreground)"]))


NETWORKS = {
    "UNet": {"channels": [16, 32, 64], "strides": [2, 2], "norm": ["instance", {"affine": True}]},
    "SwinUNETR": {"feature_size": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4},
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["lora", "ssf", "bias+norm"])
@pytest.mark.filterwarnings("ignore:merge created")  # where the base has no biases
def test_a_file_of_kilobytes_adapts_a_3d_network_and_merges(tmp_path, name, method):
    model, fresh = (build_model(f"monai:{name}", 3, 64, False, 3, NETWORKS[name]) for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    medpeft.apply(model, method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    medpeft.save(model.eval(), tmp_path / "a.safetensors")
    whole = sum(p.numel() for p in model.parameters())
    assert (tmp_path / "a.safetensors").stat().st_size < 0.25 * 4 * whole
    images = torch.randn(1, 3, 64, 32, 32)
    loaded = medpeft.load(fresh, tmp_path / "a.safetensors").eval()
    with torch.no_grad():
        expected = model(images)
        merged = medpeft.merge(loaded)(images)
    assert torch.allclose(merged, expected, atol=1e-4 * float(expected.abs().max()))
