"""A checkpoint and a folder are enough to predict what the trainer predicted."""

import csv

import numpy as np
import predict
import pytest
import timm
from PIL import Image
from small_training import run

import medpeft

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of grey and coloured images of several sizes and depths."""
    root = tmp_path_factory.mktemp("images")
    for name, level in (("dark", 60), ("light", 160)):
        (root / name).mkdir()
        for i in range(12):
            pixels = RNG.normal(level, 40, (30 + i, 40)).clip(0, 255).astype(np.uint8)
            if i % 3 == 1:
                pixels = np.stack([pixels, pixels // 2, pixels // 3], 2)
            if i % 3 == 2:
                pixels = pixels.astype(np.uint16) * 16
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module", params=["pretrained", "random"])
def finished(folder, tmp_path_factory, request):
    output = tmp_path_factory.mktemp(request.param)
    more = (
        ["--image-size", "48"]
        if request.param == "pretrained"
        else ["--model", "test_vit", "--no-pretrained", "--seed", "3"]
    )
    given = [
        "--data",
        str(folder),
        "--epochs",
        "2",
        "--output",
        str(output),
        "--method",
        "bias+lora",
        "--quiet",
        "--no-figures",
        *more,
    ]
    record = run(*given, "--image-size", "48")
    return output, record


def rows_of(file):
    with file.open(newline="") as opened:
        return {row["path"]: row for row in csv.DictReader(opened)}


def test_predictions_equal_those_of_the_trainer(folder, finished, tmp_path):
    output, record = finished
    assert (
        predict.main(
            [str(output / "adapter.safetensors"), str(folder), "--output", str(tmp_path / "all.csv")]
        )
        == 0
    )
    found, expected = rows_of(tmp_path / "all.csv"), rows_of(output / "predictions.csv")
    assert len(found) == 24
    assert len(expected) == sum(record["images"]["test"].values()) >= 4
    for name, row in expected.items():
        for column in ("p(dark)", "p(light)"):
            assert float(found[name][column]) == pytest.approx(float(row[column]), abs=1e-5)
        for column in ("positive(dark)", "positive(light)", "set"):
            assert found[name][column] == row[column]
    assert record["fitted"]["temperature"] != 1
    values = [float(row["p(dark)"]) for row in found.values()]
    assert max(values) - min(values) > 1e-3


def test_stored_pixels_smaller_than_the_input_are_predicted_as_trained(folder, tmp_path):
    arrays = {}
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        arrays[f"{part}_images"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count) % 2)[:, None]
    np.savez(tmp_path / "toy.npz", **arrays)
    for i, pixels in enumerate(arrays["test_images"]):
        (tmp_path / "test").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "test" / f"{i}.png")
    given = [
        "--data",
        str(tmp_path / "toy.npz"),
        "--model",
        "test_vit",
        "--no-pretrained",
        "--image-size",
        "64",
        "--epochs",
        "1",
    ]
    run(*given, "--output", tmp_path / "run", "--quiet", "--no-figures")
    adapter = str(tmp_path / "run" / "adapter.safetensors")
    predict.main([adapter, str(tmp_path / "test"), "--output", str(tmp_path / "found.csv"), "--quiet"])
    found, expected = (
        [[float(row["p(0)"]), float(row["p(1)"])] for row in rows_of(file).values()]
        for file in (tmp_path / "found.csv", tmp_path / "run" / "predictions.csv")
    )
    assert np.allclose(found, expected, atol=1e-5)


def test_broken_images_are_named_or_left_out(folder, finished, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "images" / "whole.png")
    (tmp_path / "images" / "torn.png").write_bytes(b"no image")
    given = [
        str(finished[0] / "adapter.safetensors"),
        str(tmp_path / "images"),
        "--output",
        str(tmp_path / "found.csv"),
    ]
    assert predict.main(given) == 2
    assert "torn.png could not be read as an image" in capsys.readouterr().err
    assert not (tmp_path / "found.csv").exists()
    assert predict.main([*given, "--skip-broken"]) == 0
    assert "left out:" in capsys.readouterr().err
    assert list(rows_of(tmp_path / "found.csv")) == ["whole.png"]


def test_one_image_may_stand_for_a_folder(folder, finished, tmp_path):
    given = [
        str(finished[0] / "adapter.safetensors"),
        str(folder / "dark" / "0.png"),
        "--output",
        str(tmp_path / "found.csv"),
    ]
    assert predict.main(given) == 0
    assert list(rows_of(tmp_path / "found.csv")) == ["0.png"]


def test_an_adapter_of_another_program_is_refused(folder, tmp_path, capsys):
    model = medpeft.apply(timm.create_model("test_vit", num_classes=2), "bias")
    medpeft.save(model, tmp_path / "other.safetensors", metadata={"classes": ["a", "b"]})
    assert predict.main([str(tmp_path / "other.safetensors"), str(folder)]) == 2
    assert "does not say how images become input" in capsys.readouterr().err


def test_a_folder_without_images_is_refused(finished, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert predict.main([str(finished[0] / "adapter.safetensors"), str(tmp_path / "empty")]) == 2
    assert "has no images" in capsys.readouterr().err


# With labels


def test_where_labels_are_known_the_scores_are_printed(folder, finished, tmp_path, capsys):
    output, record = finished
    table = rows_of(output / "predictions.csv")
    lines = [f"{folder / name};{row['label']}" for name, row in table.items()]
    (tmp_path / "test.csv").write_text("\n".join(["file;truth", *lines]))
    given = [str(output / "adapter.safetensors"), str(tmp_path / "test.csv"), "--path-column", "file"]
    given += ["--output", str(tmp_path / "found.csv")]
    assert predict.main([*given, "--label-column", "truth"]) == 0
    shown = capsys.readouterr().out
    assert f"macro-F1            {record['test']['macro_f1']:.4f}" in shown
    assert f"95 % intervals: 1000 draws of {len(table)} images" in shown
    assert "At each class's threshold" in shown
    found = rows_of(tmp_path / "found.csv").values()
    assert [row["label"] for row in found] == [row["label"] for row in table.values()]
    assert predict.main(given) == 0
    assert "macro-F1" not in capsys.readouterr().out
    assert "label" not in next(iter(rows_of(tmp_path / "found.csv").values()))


def test_labels_of_another_task_are_refused(folder, finished, tmp_path, capsys):
    (tmp_path / "test.csv").write_text(f"path,label\n{folder / 'dark' / '0.png'},grey\n")
    assert predict.main([str(finished[0] / "adapter.safetensors"), str(tmp_path / "test.csv")]) == 2
    assert "has the label 'grey', and the adapter the classes dark, light" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "gpu"], "--device gpu cannot be had"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--output", "no/dir/found.csv"], "is no file in a folder that exists"),
        (["--output", "."], "is no file in a folder that exists"),
    ],
)
def test_wrong_flags_are_answered_before_any_work(folder, finished, capsys, monkeypatch, given, message):
    monkeypatch.setattr(predict, "rebuild", None)
    assert predict.main([str(finished[0] / "adapter.safetensors"), str(folder), *given]) == 2
    assert message in capsys.readouterr().err
