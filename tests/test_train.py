"""The reference trainer trains, saves, resumes, and answers wrong flags with what to do."""

import csv
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors import safe_open

import medpeft

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import train
from trainer.batches import Part, make_transform, plain_batches
from trainer.errors import TrainerError
from trainer.figure import draw_training
from trainer.flags import make_parser, parse, read_options
from trainer.images import Images
from trainer.loop import predict, warmup_cosine
from trainer.metrics import score
from trainer.models import build_model, input_statistics
from trainer.reliability import draw_reliability
from trainer.sources import read_data
from trainer.split import split

EXAMPLES = Path(train.__file__).parent
TINY = ["--model", "test_efficientnet", "--no-pretrained", "--image-size", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stripes across and stripes down: 20 noisy images of each, of different thickness."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    for i in range(20):
        wave = 127 + 90 * np.sin(np.arange(32) / rng.uniform(0.6, 1.2))
        stripes = np.clip(wave[:, None] + rng.normal(0, 15, (32, 32)), 0, 255).astype(np.uint8)
        for name, image in (("across", stripes), ("down", stripes.T)):
            (root / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(root / name / f"{i}.png")
    return root


def flags(folder, output, *more):
    return [*TINY, "--data", str(folder), "--output", str(output), "--epochs", "2", "--no-figures", *more]


def run(*given):
    return train.run(parse(make_parser(""), [str(flag) for flag in given]))


def messages(capsys, *given):
    assert train.main([str(flag) for flag in given]) == 2
    return capsys.readouterr().err


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
    assert score(logits.softmax(1), labels)["ece"] == pytest.approx(record["test"]["ece_uncalibrated"], abs=1e-4)


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
    more = ["--method", "lora", "--option", "rank=2", "--option", "rslora=true", "--class-weights", "--epochs", "1"]
    first = run(*flags(folder, tmp_path / "first", *more))
    again = run("--config", tmp_path / "first" / "config.yaml", "--output", tmp_path / "again")
    assert again["test_predictions"] == first["test_predictions"]
    assert again["settings"] | {"output": ""} == first["settings"] | {"output": "", "config": again["settings"]["config"]}


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


# Stopping and resuming


def history(record):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]]


def test_a_killed_run_resumes_to_the_same_result(folder, tmp_path, monkeypatch):
    more = ["--epochs", "3", "--method", "full"]
    whole = run(*flags(folder, tmp_path / "whole", *more))

    def killed(training):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.epoch_line", killed)
        assert train.main(flags(folder, tmp_path / "cut", *more)) == 130
    assert not (tmp_path / "cut" / "metrics.json").exists()
    resumed = run(*flags(folder, tmp_path / "cut", *more, "--resume"))
    assert history(resumed) == history(whole)
    assert resumed["test"] == whole["test"]


def test_resuming_a_finished_run_trains_no_further(folder, tmp_path, capsys):
    first = run(*flags(folder, tmp_path))
    capsys.readouterr()
    again = run(*flags(folder, tmp_path, "--resume"))
    assert "Resumed after epoch 2" in capsys.readouterr().out
    assert again["history"] == first["history"]
    assert again["test"] == first["test"]


def test_resuming_without_a_checkpoint_begins(folder, tmp_path, capsys):
    record = run(*flags(folder, tmp_path, "--resume", "--epochs", "1"))
    assert "has no last.ckpt: beginning with epoch 1" in capsys.readouterr().out
    assert len(record["history"]) == 1


def test_resuming_with_other_settings_is_refused(folder, tmp_path, capsys):
    given = flags(folder, tmp_path, "--epochs", "1", "--method", "bn")
    run(*given)
    for changed, text in (
        (["--lr", "0.5"], "--lr was 0.003 and is 0.5. Resume with the same ones"),
        (["--model", "test_resnet"], "--model was 'test_efficientnet' and is 'test_resnet'"),
        (["--data", str(tmp_path)], "no images"),
    ):
        assert text in messages(capsys, *given, *changed, "--resume")


def test_training_stops_early_and_keeps_the_best_epoch(folder, tmp_path, monkeypatch):
    scores = iter([0.5, 0.8, 0.7, 0.6, 0.9])
    monkeypatch.setattr("trainer.loop.macro_f1", lambda logits, labels: next(scores))
    record = run(*flags(folder, tmp_path, "--epochs", "5", "--patience", "2"))
    assert len(record["history"]) == 4
    assert record["best_epoch"] == 2


def test_a_loss_that_is_no_number_stops_with_advice(folder, tmp_path, capsys):
    error = messages(capsys, *flags(folder, tmp_path, "--method", "full", "--lr", "1e30"))
    assert "The training loss became nan in epoch" in error
    assert "Lower --lr" in error


def test_the_learning_rate_warms_up_and_falls_to_zero():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.5
    assert max(rates) == rates[3] == 2.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] < 0.01


# Cached features


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


# Subgroups


def test_subgroups_are_scored_apart(folder, tmp_path, capsys):
    file = tmp_path / "table.csv"
    rows = [(path, path.parent.name, "f" if i % 3 else "m") for i, path in enumerate(sorted(folder.glob("*/*.png")))]
    file.write_text("\n".join(["path,label,sex", *(",".join(map(str, row)) for row in rows)]))
    record = run(*flags(file, tmp_path / "out", "--group-column", "sex", "--epochs", "1"))
    found = record["test_subgroups"]
    assert sum(scores["images"] for scores in found.values()) == sum(record["images"]["test"].values())
    matrices = np.sum([scores["confusion_matrix"] for scores in found.values()], 0)
    assert matrices.tolist() == record["test"]["confusion_matrix"]
    assert "subgroup  images" in capsys.readouterr().out


# Models


def test_the_default_model_knows_photographs():
    from skimage import data, transform

    model = build_model("tf_efficientnet_lite0", 1000, 224)
    fresh = model.get_classifier()
    assert fresh.out_features == 1000
    assert input_statistics(model) == ([0.5] * 3, [0.5] * 3)
    # The fresh head knows nothing, so the features speak: two crops of a cat are closer than a rocket.
    views = [data.chelsea()[:, 60:360], data.chelsea()[:, 100:400], data.rocket()[:, 100:400]]
    pixels = [transform.resize(view, (160, 160)) * 2 - 1 for view in views]
    batch = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        a, b, c = model.eval().forward_head(model.forward_features(batch), pre_logits=True)
    close, far = torch.cosine_similarity(a, b, dim=0), torch.cosine_similarity(a, c, dim=0)
    assert close > 0.7 > 0.4 > far


def test_a_model_of_fixed_size_is_built_for_the_input():
    model = build_model("test_vit", 3, 64, pretrained=False)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_an_unknown_model_is_answered_with_a_near_name(capsys):
    assert "timm has no model 'resnet5'. Did you mean resnet50" in messages(capsys, "--model", "resnet5")


def test_weights_that_cannot_be_fetched_are_answered_with_a_way_out(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host\nand much more")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(TrainerError, match=r"'resnet18' .* no route to host .*--no-pretrained"):
        build_model("resnet18", 2, 64)


# Batches


def images(count):
    pixels = torch.full((count, 1, 8, 8), 255, dtype=torch.uint8)
    return Images(pixels, np.zeros(count, np.int64), ["a"], np.arange(count))


def test_a_part_is_enlarged_normalised_and_grey_in_three_channels():
    part = Part(images(2), np.array([1]), make_transform(16, [0.5] * 3, [0.25] * 3))
    pixels, label = part[0]
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels, torch.full((3, 16, 16), 2.0))
    assert label == 0


@pytest.mark.parametrize("augment", ["light", "strong"])
def test_augmentation_changes_an_image_and_repeats_with_its_seed(augment):
    part = Part(images(1), np.array([0]), make_transform(16, [0.5] * 3, [0.5] * 3, augment))
    state = torch.get_rng_state()
    first, again, other = (part[0, seed][0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


# Flags


def test_options_are_read_with_their_types():
    pairs = ["rank=4", "alpha=0.5", "dora=True", "rslora=false", "init=pissa", "x=none"]
    assert read_options("lora", pairs) == {
        "lora": {
            "rank": 4,
            "alpha": 0.5,
            "dora": True,
            "rslora": False,
            "init": "pissa",
            "x": None,
        }
    }


def test_options_of_a_union_name_their_method():
    assert read_options("lora+ssf", ["lora.rank=4"]) == {"lora": {"rank": 4}, "ssf": {}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--option", "rank"], "--option rank is not of the form NAME=VALUE"),
        (["--method", "lora+ssf", "--option", "rank=4"], "Say for which: --option lora.rank=4"),
        (["--option", "lora.rank=4"], "is for 'lora', and --method is ssf"),
        (["--k-folds", "1"], "--k-folds is 1 and --fold 0; take at least 2 folds"),
        (["--k-folds", "3", "--fold", "3"], "folds, numbered from 0"),
        (["--group-column", "sex"], "--group-column sex names a column, and --data None has none"),
        ([*TINY, "--cache-features"], "methods that train the head alone, and"),
        (["--train-fraction", "0"], "--train-fraction is 0.0; it must be above 0"),
        (["--epochs", "0"], "--epochs is 0; it must be at least 1"),
        (["--lr", "0"], "--lr is 0.0; it must be above 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--data", "nowhere"], "--data nowhere does not exist"),
        (["--test-fraction", "0.9"], "Their sum must stay below 1"),
        ([*TINY, "--method", "lra"], "Did you mean 'lora'?"),
        ([*TINY, "--option", "rnk=1"], "Unknown option 'rnk'"),
        ([*TINY, "--target", "nothing.*"], "nothing"),
    ],
)
def test_wrong_flags_are_answered_with_what_to_do(capsys, given, message):
    assert message in messages(capsys, *given)


def test_a_file_gives_flags_and_given_ones_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "method: lora\noption: {rank: 4, dora: true}\nlr: 0.02\nimage_size: 64\nclass-weights: true\ntarget: [a, b]"
    )
    args = parse(make_parser(""), ["--config", str(file), "--lr", "0.5", "--option", "rank=2"])
    assert (args.method, args.lr, args.image_size, args.class_weights) == ("lora", 0.5, 64, True)
    assert args.option == {"lora": {"rank": 2, "dora": True}}
    assert args.target == ["a", "b"]
    assert parse(make_parser(""), ["--config", str(file), "--target", "c"]).target == ["c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "the key 'epoch', and train.py no flag --epoch. Did you mean 'epochs'?"),
        ("- lr", "holds a list. Write one flag a line"),
        ("class_weights: 1", "'class-weights' is 1; write true or false"),
        ("lr: [1, 2]", "'lr' is [1, 2]; one value is needed"),
        ("option: 3", "'option' is 3. Write a mapping"),
        ("{", "could not be read"),
    ],
)
def test_a_wrong_file_of_flags_is_answered_with_what_to_do(tmp_path, capsys, text, message):
    (tmp_path / "run.yaml").write_text(text)
    assert message in messages(capsys, "--config", tmp_path / "run.yaml")


@pytest.mark.parametrize(("method", "rate"), [("ssf", 3e-3), ("full", 3e-4), ("bias+tsa", 3e-4), ("svdiff+bn", 3e-3)])
def test_a_union_takes_the_lowest_rate_of_its_parts(method, rate):
    assert parse(make_parser(""), ["--method", method]).lr == rate


def test_the_help_names_every_method(capsys):
    with pytest.raises(SystemExit):
        train.main(["--help"])
    listed = " ".join(capsys.readouterr().out.split())
    assert ", ".join(medpeft.methods()) in listed


# The figures


def test_the_reliability_diagram_shows_how_often_each_confidence_is_right(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.bar
    monkeypatch.setattr(Axes, "bar", lambda self, *args, **more: drawn.append(args) or original(self, *args, **more))
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.4, 0.6], [0.4, 0.6]])
    draw_reliability({"one": probabilities}, torch.tensor([0, 1, 1, 1]), tmp_path / "figure.png")
    shares, counts = drawn[0][1], drawn[1][1]
    assert {i: (shares[i], counts[i]) for i in np.flatnonzero(counts)} == {8: (1.0, 2), 14: (0.5, 2)}
    assert np.asarray(Image.open(tmp_path / "figure.png").convert("L")).std() > 20


def test_labels_of_many_long_classes_do_not_overlap(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [f"a very long class name number {i}" for i in range(9)]
    record = {"train_loss": 1.0, "val_loss": 1.1, "val_macro_f1": 0.4}
    drawn = []
    original = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), original(self, path)))
        counts = np.full((9, 9), 1234).tolist()
        draw_training([record] * 30, 7, counts, names, "title", tmp_path / "figure.png")
    axes = drawn[0].axes[2]
    renderer = FigureCanvasAgg(drawn[0]).get_renderer()
    for labels in (axes.texts[:9], axes.get_yticklabels()):
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    right = max(text.get_window_extent(renderer).x1 for text in axes.texts)
    assert right < drawn[0].bbox.x1
