"""Cached features give what images give; few blocks are adapted; a memory chooses how many."""

import pytest
from small_training import checked, flags, messages, run
from trainer.networks.memory import within_memory

import medpeft

LAST = ["--model", "test_vit2", "--method", "lora", "--depth", "0.25", "--lr", "0.02"]


def losses(record):
    return [(epoch["train_loss"], epoch["val_loss"]) for epoch in record["history"]]


def flat(record):
    return [loss for pair in losses(record) for loss in pair]


# Cached features


def test_features_are_computed_once_and_train_the_same_head(stripes, tmp_path, capsys, monkeypatch):
    given = ["--method", "linear_probe", "--lr", "0.05", "--epochs", "3"]
    cache = ["--cache-features", str(tmp_path / "features")]
    slow = run(*flags(stripes, tmp_path / "slow", *given, "--augment", "none"))
    first = run(*flags(stripes, tmp_path / "first", *given, *cache))
    said = capsys.readouterr().out
    assert "Computed the features of 40 images" in said
    assert "features of EfficientNet are the input of 'classifier'" in said
    # The second run computes nothing of an image.
    monkeypatch.setattr(medpeft.Prefix, "features", None)
    second = run(*flags(stripes, tmp_path / "second", *given, *cache, "--lr", "0.2", "--seed", "0"))
    assert "Took the features of 40 images" in capsys.readouterr().out
    assert flat(first) == pytest.approx(flat(slow), rel=1e-4)
    assert flat(second) != pytest.approx(flat(slow), rel=1e-3)
    assert first["test"]["macro_f1"] == slow["test"]["macro_f1"]
    assert first["history"][-1]["train_loss"] < first["history"][0]["train_loss"]
    monkeypatch.undo()
    other = ["--method", "linear_probe", *cache, "--epochs", "1", "--image-size", "40"]
    run(*flags(stripes, tmp_path / "other", *other))
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_last_blocks_train_on_views_kept_as_on_views_of_images(stripes, tmp_path, capsys, monkeypatch):
    given = [*LAST, "--views", "2", "--epochs", "3"]
    cache = ["--cache-features", str(tmp_path / "features")]
    slow = run(*flags(stripes, tmp_path / "slow", *given))
    first = run(*flags(stripes, tmp_path / "first", *given, *cache))
    assert "images in 2 views" in capsys.readouterr().out
    monkeypatch.setattr(medpeft.Prefix, "features", None)
    second = run(*flags(stripes, tmp_path / "second", *given, *cache))
    assert flat(first) == pytest.approx(flat(slow), rel=1e-4)
    assert flat(second) == flat(first)
    assert first["test"]["auroc"] == slow["test"]["auroc"]
    endless = run(*flags(stripes, tmp_path / "endless", *LAST, "--epochs", "3"))
    # The first two epochs have the same views; then these return.
    assert flat(endless)[:4] == pytest.approx(flat(slow)[:4], rel=1e-4)
    assert flat(endless)[4:] != pytest.approx(flat(slow)[4:], rel=1e-3)


def test_features_of_half_precision_take_half_the_room(stripes, tmp_path):
    sizes = {}
    for kind in ("float32", "bfloat16"):
        cache = ["--cache-features", str(tmp_path / kind), "--feature-dtype", kind, "--epochs", "1"]
        run(*flags(stripes, tmp_path / f"run {kind}", *LAST, *cache))
        (file,) = (tmp_path / kind).iterdir()
        sizes[kind] = file.stat().st_size - 8192
    assert sizes["bfloat16"] * 2 == sizes["float32"]


def test_a_damaged_file_of_features_is_computed_again_and_a_cut_one_refused(stripes, tmp_path, capsys):
    given = [*LAST, "--cache-features", str(tmp_path / "features"), "--epochs", "1"]
    whole = run(*flags(stripes, tmp_path / "whole", *given))
    (file,) = (tmp_path / "features").iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-1000] + b"?" * 1000)
    assert flat(run(*flags(stripes, tmp_path / "again", *given))) == flat(whole)
    assert file.read_bytes() == content
    file.write_bytes(content[:-1000])
    assert "was cut off or added to" in messages(capsys, *flags(stripes, tmp_path / "cut", *given))


def test_what_changes_before_the_place_is_refused(stripes, tmp_path, capsys):
    dropping = ["--cache-features", str(tmp_path / "features"), "--model-option", "drop_path_rate=0.5"]
    said = messages(capsys, *flags(stripes, tmp_path / "run", *LAST, *dropping))
    assert "--cache-features: " in said
    assert "drop" in said


# Depth


def test_a_depth_is_in_the_file(stripes, tmp_path):
    record = run(*flags(stripes, tmp_path / "run", *LAST, "--epochs", "1"))
    every = run(
        *flags(stripes, tmp_path / "every", "--model", "test_vit2", "--method", "lora", "--epochs", "1")
    )
    assert record["trainable"] < every["trainable"]
    assert medpeft.inspect(tmp_path / "run" / "adapter.safetensors").document["depth"] == 0.25


# Memory


def test_a_memory_chooses_depth_and_checkpointing():
    settings = checked(model="test_vit2", no_pretrained=True, image_size=64, method="lora")
    ways = {}
    for memory in ("1GiB", "5MiB", "3.8 MiB", "3.6MiB"):
        chosen, note = within_memory(settings, memory)
        ways[memory] = (chosen.depth, chosen.checkpoint_activations)
        assert note.startswith(f"--memory {memory}: --depth {chosen.depth:g}")
        assert ("--checkpoint-activations" in note) is chosen.checkpoint_activations
    assert list(ways.values()) == [(1.0, False), (1.0, True), (0.5, True), (0.25, True)]


def test_a_depth_is_the_most_that_a_memory_chooses():
    settings = checked(model="test_vit2", no_pretrained=True, image_size=64, method="lora", depth=0.25)
    assert within_memory(settings, "1GiB")[0].depth == 0.25


def test_a_run_in_a_memory_goes_on_and_says_what_it_chose(stripes, tmp_path, capsys):
    given = ["--model", "test_vit2", "--image-size", "64", "--method", "lora", "--memory", "3.8MiB"]
    flagged = [*flags(stripes, tmp_path / "run", *given, "--epochs", "1"), "--image-size", "64"]
    record = run(*flagged)
    assert record["settings"]["depth"] == 0.5
    assert "--memory 3.8MiB: --depth 0.5 --checkpoint-activations" in capsys.readouterr().out
    assert run(*flagged)["seconds"] == record["seconds"]
