"""The reference trainer trains, and saves what it takes to use what it trained and to know what it did."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train
from PIL import Image
from safetensors import safe_open
from small_training import checked, flags, messages, run
from trainer.data.batches import Part, Preprocessing
from trainer.data.sources import read_data
from trainer.data.splits import split
from trainer.judging.scores import scaled, score
from trainer.networks.model import build_model

import medpeft

EXAMPLES = Path(train.__file__).parent


# A whole run


@pytest.fixture(scope="module")
def finished(stripes, tmp_path_factory):
    """A run of the pretrained default model on the stripes."""
    output = tmp_path_factory.mktemp("parent") / "finished"
    given = ["--data", stripes, "--image-size", 48, "--epochs", 3, "--batch-size", 8]
    record = run(*given, "--method", "ssf", "--class-weights", "--output", output)
    return output, record


def test_training_lowers_the_loss_and_learns(finished):
    _, record = finished
    losses = [epoch["train_loss"] for epoch in record["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert record["test"]["macro_f1"] > 0.7
    low, high = record["test"]["intervals"]["macro_f1"]
    assert low <= record["test"]["macro_f1"] <= high
    assert record["best_val_score"] == max(epoch["val_macro_f1"] for epoch in record["history"])


def test_the_adapter_is_saved_with_what_it_takes_to_use_it(finished):
    output, record = finished
    with safe_open(output / "adapter.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert count >= record["trainable"]
    described = str(medpeft.inspect(output / "adapter.safetensors"))
    for expected in ("tf_efficientnet_lite0", "across", "48"):
        assert expected in described


def test_the_adapter_on_a_fresh_base_gives_the_same_scores(stripes, finished):
    output, record = finished
    model = build_model("tf_efficientnet_lite0", 2, 48)
    medpeft.load(model, output / "adapter.safetensors")
    settings = checked(data=str(stripes), image_size=48)
    images = read_data(settings)
    metadata = medpeft.inspect(output / "adapter.safetensors").metadata
    part = Part(images, split(images, settings)["test"], Preprocessing.from_metadata(metadata, output))
    inputs, labels = (torch.stack(own) for own in zip(*(part[i] for i in range(len(part))), strict=True))
    with torch.no_grad():
        logits = model.eval()(inputs)
    again = score(scaled(logits, record["fitted"]["temperature"]), labels)
    assert again["confusion_matrix"] == record["test"]["confusion_matrix"]
    assert again["calibration_error"] == pytest.approx(record["test"]["calibration_error"], abs=1e-4)
    assert score(scaled(logits, 1), labels)["calibration_error"] == pytest.approx(
        record["test"]["calibration_error_untempered"], abs=1e-4
    )


def test_predictions_are_written_image_by_image(finished):
    output, record = finished
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    columns = ["path", "label", "prediction", "p(across)", "p(down)", "positive(across)", "positive(down)"]
    assert list(rows[0]) == [*columns, "set"]
    assert [row["path"].split("/")[0] for row in rows] == [row["label"] for row in rows]
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert right == np.trace(record["test"]["confusion_matrix"])


def test_a_run_says_what_it_cost(finished):
    _, record = finished
    assert 0 < record["step_seconds"] < record["seconds"]
    # The first convolution of the batch of 8 alone keeps its input, 8 × 3 × 48 × 48 floats.
    assert record["saved_bytes"] > 8 * 3 * 48 * 48 * 4
    assert record["peak_bytes"] > 2**25
    assert record["peak_memory"] in ("CUDA allocations", "resident set of the process")
    assert set(record["val"]) == set(record["test"]) - {"intervals"}


def test_the_metrics_are_saved_as_strict_json(finished):
    output, record = finished

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads((output / "metrics.json").read_text(), parse_constant=refuse)
    assert saved == record
    assert saved["settings"]["method"] == "ssf"
    assert saved["images"]["test"] == {"across": 4, "down": 4}
    assert np.sum(saved["test"]["confusion_matrix"]) == 8


def test_every_epoch_is_in_the_csv(finished):
    output, record = finished
    with next(output.glob("logs/*/metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_loss"]]
    losses = [epoch["train_loss"] for epoch in record["history"]]
    assert [float(row["train_loss"]) for row in rows] == pytest.approx(losses)


@pytest.mark.parametrize("name", ["training.png", "reliability.png", "curves.png"])
def test_a_figure_is_a_picture_with_something_on_it(finished, name):
    pixels = np.asarray(Image.open(finished[0] / name).convert("L"))
    assert min(pixels.shape) > 700
    assert pixels.std() > 10


def test_a_finished_run_is_given_again_and_never_overwritten(stripes, finished, capsys, monkeypatch):
    output, record = finished
    before = (output / "adapter.safetensors").read_bytes()
    monkeypatch.setattr("trainer.work.read_data", None)
    given = ["--data", stripes, "--image-size", 48, "--batch-size", 8, "--method", "ssf", "--class-weights"]
    assert run(*given, "--epochs", 3, "--output", output) == record
    assert "has this run already: macro-F1" in capsys.readouterr().out
    for changed, text in (
        (["--epochs", 4], "--epochs was 3 and is 4. Go on with the same ones, or choose another --output"),
        (["--epochs", 3, "--lr", 0.5], "--lr was 0.003 and is 0.5"),
        (["--epochs", 3, "--data", stripes / ".."], "--data was"),
    ):
        assert text in messages(capsys, *given, *changed, "--output", output)
    assert (output / "adapter.safetensors").read_bytes() == before


def test_a_run_repeats_from_the_settings_that_it_wrote_and_quiet_prints_nothing(stripes, tmp_path, capfd):
    more = ["--method", "lora", "--option", "rank=2", "--option", "rslora=true", "--class-weights"]
    first = run(*flags(stripes, tmp_path / "first", *more, "--epochs", "1", "--quiet"))
    again = run("--config", tmp_path / "first" / "settings.yaml", "--output", tmp_path / "again")
    assert again["test"] == first["test"]
    assert again["settings"] | {"output": ""} == first["settings"] | {"output": ""}
    read = [(tmp_path / name / "predictions.csv").read_text() for name in ("first", "again")]
    assert read[0] == read[1]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", ["linear_probe", "bn+bias", "tsa"])
def test_other_methods_train_too(stripes, tmp_path, method):
    record = run(*flags(stripes, tmp_path / "run", "--method", method, "--epochs", "1"))
    assert np.isfinite(record["history"][0]["train_loss"])
    assert (tmp_path / "run" / "adapter.safetensors").exists()


def test_a_network_of_monai_trains_on_volumes(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 8), ("val", 4), ("test", 4)):
        labels = np.arange(count) % 2
        shades = 60 + 100 * labels[:, None, None, None]
        arrays[f"{part}_images"] = (shades + rng.integers(0, 40, (count, 16, 16, 16))).astype(np.uint8)
        arrays[f"{part}_labels"] = labels
    np.savez(tmp_path / "volumes.npz", **arrays)
    given = [
        "--data",
        tmp_path / "volumes.npz",
        "--model",
        "monai:resnet10",
        "--no-pretrained",
        "--no-figures",
    ]
    record = run(*given, "--method", "lora", "--image-size", 16, "--epochs", 1, "--output", tmp_path / "run")
    assert record["images"]["test"] == {"0": 2, "1": 2}
    assert record["saved_bytes"] > 0


def test_the_command_line_runs_by_itself_without_carriage_returns(stripes, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train.py", *flags(stripes, tmp_path / "run", "--epochs", "2")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("ssf on", "epoch   1", "best so far", "Test on 8 images", "macro-F1", "AUROC", "Saved"):
        assert expected in done.stdout
    assert "\r" not in done.stdout + done.stderr
    assert done.stdout.count("\nepoch ") == 2
    # Where torchao is installed, torch has words for it when transformers imports it.
    said = [line for line in done.stderr.splitlines() if "torch/utils/_pytree.py" not in line]
    assert said == []


def test_an_output_that_cannot_be_written_says_so(stripes, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "cannot be written to" in messages(capsys, *flags(stripes, tmp_path / "file" / "run"))


# Subgroups


def test_subgroups_are_scored_apart(stripes, tmp_path, capsys):
    rows = [
        (path, path.parent.name, "fm"[i % 3 == 0]) for i, path in enumerate(sorted(stripes.glob("*/*.png")))
    ]
    file = tmp_path / "table.csv"
    file.write_text("\n".join(["path,label,sex", *(",".join(map(str, row)) for row in rows)]))
    record = run(*flags(file, tmp_path / "out", "--group-column", "sex", "--epochs", "1"))
    found = record["test_subgroups"]
    assert sum(scores["images"] for scores in found.values()) == sum(record["images"]["test"].values())
    matrices = np.sum([scores["confusion_matrix"] for scores in found.values()], 0)
    assert matrices.tolist() == record["test"]["confusion_matrix"]
    assert "subgroup" in capsys.readouterr().out
