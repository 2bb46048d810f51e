"""The reference trainer trains, and saves what it takes to use what it trained and to know what it did."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import train
from lightning.fabric import Fabric
from PIL import Image
from safetensors import safe_open
from small_training import draw_stripes, flags, run
from trainer.batches import Part, make_transform, plain_batches
from trainer.flags import make_parser, parse
from trainer.loop import predict
from trainer.metrics import score
from trainer.models import build_model, input_statistics
from trainer.sources import read_data
from trainer.split import split

import medpeft

EXAMPLES = Path(train.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_stripes(tmp_path_factory.mktemp("stripes"))


# A whole run


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of the pretrained default model on the stripes."""
    output = tmp_path_factory.mktemp("finished")
    given = ["--data", folder, "--image-size", 48, "--epochs", 3, "--batch-size", 8]
    record = run(*given, "--method", "ssf", "--class-weights", "--output", output)
    return output, record


def test_training_lowers_the_loss_and_learns(finished):
    _, record = finished
    losses = [epoch["train_loss"] for epoch in record["history"]]
    assert losses[-1] < 0.7 * losses[0]
    assert record["test"]["macro_f1"] > 0.7


def test_the_adapter_is_saved_with_what_it_takes_to_use_it(finished):
    output, record = finished
    with safe_open(output / "adapter.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    assert count >= record["trainable"]
    described = str(medpeft.inspect(output / "adapter.safetensors"))
    for expected in ("tf_efficientnet_lite0", "across", "48"):
        assert expected in described


def test_the_adapter_on_a_fresh_base_gives_the_same_scores(folder, finished):
    output, record = finished
    model = build_model("tf_efficientnet_lite0", 2, 48)
    medpeft.load(model, output / "adapter.safetensors")
    images = read_data(folder, 48)
    part = Part(images, split(images, seed=0)["test"], make_transform(48, *input_statistics(model)))
    logits, labels = predict(Fabric(accelerator="cpu"), model, plain_batches(part, 8))
    again = score((logits / record["temperature"]).softmax(1), labels)
    assert again["confusion_matrix"] == record["test"]["confusion_matrix"]
    assert again["ece"] == pytest.approx(record["test"]["ece"], abs=1e-4)
    assert score(logits.softmax(1), labels)["ece"] == pytest.approx(
        record["test"]["ece_uncalibrated"], abs=1e-4
    )


def test_predictions_are_written_image_by_image(finished):
    output, record = finished
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert "test_predictions" not in json.loads((output / "metrics.json").read_text())
    found = record["test_predictions"]
    assert len(rows) == len(found["index"]) == 8
    assert [row["image"].split("/")[0] for row in rows] == [row["label"] for row in rows]
    assert [float(row["p(down)"]) for row in rows] == pytest.approx([p[1] for p in found["probabilities"]])


def test_a_run_says_what_it_cost(finished):
    _, record = finished
    assert 0 < record["step_seconds"] < record["seconds"]
    # The first convolution of the batch of 8 alone keeps its input, 8 × 3 × 48 × 48 floats.
    assert record["saved_bytes"] > 8 * 3 * 48 * 48 * 4
    assert record["peak_bytes"] > 2**25
    assert record["peak_memory"] in ("CUDA allocations", "resident set of the process")
    assert set(record["val"]) == set(record["test"])


def test_data_read_once_serve_another_run_and_quiet_prints_nothing(folder, finished, tmp_path, capfd):
    given = flags(folder, tmp_path, "--epochs", "1", "--quiet")
    args = parse(make_parser(""), given)
    images = train.images_of(args)
    shared = train.run(args, images)
    args.output = tmp_path / "other"
    assert train.run(args)["test_predictions"] == shared["test_predictions"]
    assert capfd.readouterr() == ("", "")


def test_a_run_repeats_from_the_settings_that_it_wrote(folder, tmp_path):
    more = [
        "--method",
        "lora",
        "--option",
        "rank=2",
        "--option",
        "rslora=true",
        "--class-weights",
        "--epochs",
        "1",
    ]
    first = run(*flags(folder, tmp_path / "first", *more))
    again = run("--config", tmp_path / "first" / "config.yaml", "--output", tmp_path / "again")
    assert again["test_predictions"] == first["test_predictions"]
    assert again["settings"] | {"output": ""} == first["settings"] | {
        "output": "",
        "config": again["settings"]["config"],
    }


def test_the_metrics_are_saved_as_strict_json(finished):
    output, record = finished

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    saved = json.loads((output / "metrics.json").read_text(), parse_constant=refuse)
    assert saved["test"]["macro_f1"] == record["test"]["macro_f1"]
    assert saved["settings"]["method"] == "ssf"
    assert saved["images"]["test"] == {"across": 4, "down": 4}
    assert np.sum(saved["test"]["confusion_matrix"]) == 8


def test_the_figure_is_a_picture_with_something_on_it(finished):
    output, _ = finished
    pixels = np.asarray(Image.open(output / "training.png").convert("L"))
    assert pixels.shape[1] > 1200
    assert pixels.std() > 20


@pytest.mark.parametrize("method", ["linear_probe", "bn+bias", "tsa", "lora"])
def test_other_methods_train_too(folder, tmp_path, method):
    more = ["--option", "rank=2"] if method == "lora" else []
    record = run(*flags(folder, tmp_path, "--method", method, "--epochs", "1", *more))
    assert np.isfinite(record["history"][0]["train_loss"])
    assert (tmp_path / "adapter.safetensors").exists()


def test_the_command_line_runs_by_itself(folder, tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train.py", *flags(folder, tmp_path, "--epochs", "1")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for expected in ("ssf on", "epoch   1", "Test on 8 images", "macro-F1", "AUROC", "Saved"):
        assert expected in done.stdout


# Subgroups


def test_subgroups_are_scored_apart(folder, tmp_path, capsys):
    file = tmp_path / "table.csv"
    rows = [
        (path, path.parent.name, "f" if i % 3 else "m")
        for i, path in enumerate(sorted(folder.glob("*/*.png")))
    ]
    file.write_text("\n".join(["path,label,sex", *(",".join(map(str, row)) for row in rows)]))
    record = run(*flags(file, tmp_path / "out", "--group-column", "sex", "--epochs", "1"))
    found = record["test_subgroups"]
    assert sum(scores["images"] for scores in found.values()) == sum(record["images"]["test"].values())
    matrices = np.sum([scores["confusion_matrix"] for scores in found.values()], 0)
    assert matrices.tolist() == record["test"]["confusion_matrix"]
    assert "subgroup  images" in capsys.readouterr().out
