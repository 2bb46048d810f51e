"""Weights from a file: in every form in which they are published, into the model, or refused with the reason."""

import argparse
import csv

import predict
import pytest
import timm
import torch
from safetensors.torch import save_file
from small_training import draw_stripes, messages, run
from small_weights import prefixed, same_trunk, saved, trunk, vit
from trainer.errors import TrainerError
from trainer.networks.model import check_model
from trainer.networks.weights import digest, fill, load_weights
from trainer.settings import Settings

import medpeft

OTHERS = {"dino_head.mlp.0.weight": torch.ones(3, 3), "step": torch.ones(())}
WRAPPERS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
    "state_dict": lambda state: {"state_dict": prefixed("module.", state), "best": 0.5},
    "teacher": lambda state: {
        "student": prefixed("backbone.", {name: value + 1 for name, value in state.items()}),
        "teacher": prefixed("backbone.", state) | OTHERS,
    },
    "lightning": lambda state: {"state_dict": prefixed("model.encoder.", state) | OTHERS, "optimizer": [{}]},
    "optimizer": lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "model": state},
    "averaged": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state},
    "open_clip": lambda state: prefixed("visual.trunk.", state) | {"text.weight": torch.ones(2)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_is_found_in_what_is_wrapped_around_it(wrapper, tmp_path):
    state, model = trunk(vit(1)), vit()
    head = model.head.weight.detach().clone()
    filled = load_weights(model, saved(WRAPPERS[wrapper](state), tmp_path))
    assert same_trunk(model, state)
    assert torch.equal(model.head.weight, head)
    assert (len(filled.tensors), filled.trunk, filled.fresh) == (len(state), len(state), [])
    assert filled.lines("w.pth")[:2] == [
        f"w.pth: {len(state)} tensors before the head, all found",
        "  begin at random, and train with the head: the head",
    ]


def test_safetensors_and_a_head_of_the_same_size_are_taken_too(tmp_path):
    trained, model = vit(1), vit()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    filled = load_weights(model, tmp_path / "w.safetensors")
    assert same_trunk(model, trained.state_dict())
    assert filled.head_fits
    assert load_weights(vit(num_classes=5), tmp_path / "w.safetensors").head_fits is False


# What is refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            lambda: timm.create_model("test_resnet").state_dict(),
            "has 0 of the 30 tensors .*it has 'conv1.0.weight', 'conv1.1.weight'",
        ),
        (lambda: trunk(vit(embed_dim=16)), "of another size .*'cls_token"),
        (lambda: trunk(vit(depth=1)), "lacks 'blocks.1.norm1.weight'"),
        (lambda: trunk(vit(depth=3)), "has 'blocks.2.norm1.weight'.* the model computes without"),
        (lambda: {"epoch": 3}, "has no tensors by name"),
        (lambda: [1, 2], "has no tensors by name"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_model_stays(content, expected):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainerError, match=expected):
        fill(model, content(), "w.pth")
    assert same_trunk(model, before)


class Foreign:
    pass


def test_files_that_could_run_code_or_are_none_are_refused(tmp_path):
    with pytest.raises(TrainerError, match=r"w.pth holds \S+Foreign beside tensors, .*could run code"):
        load_weights(vit(), saved({"model": trunk(vit()), "config": Foreign()}, tmp_path))
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(TrainerError, match=rf"{name} cannot be read: .* Give a state dict"):
            load_weights(vit(), tmp_path / name)


def test_a_file_of_before_torch_1_6_is_read(tmp_path):
    state, model = trunk(vit(1)), vit()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "w.pth")
    assert same_trunk(model, state)


def test_a_model_without_memory_is_matched_and_stays_so(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", img_size=64, num_classes=0).state_dict()
    file = saved({"model": state}, tmp_path)
    checked = Settings(model="test_vit", weights=file, image_size=32).checked()
    first, fresh, resampled, normalised = check_model(checked)
    assert f"{len(state)} tensors before the head, all found" in first
    assert fresh.endswith("the head")
    assert resampled.endswith("pos_embed")
    assert "mean [0.5, 0.5, 0.5]" in normalised


# In a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    draw_stripes(folder)
    torch.manual_seed(3)
    file = saved({"model": timm.create_model("test_efficientnet").state_dict()}, folder)
    model = ("--model", "test_efficientnet", "--image-size", "32", "--input-std", "0.25", "--weights", file)
    more = ("--epochs", "1", "--no-figures", "--quiet", "--method", "ssf", "--model-option", "drop_rate=0.1")
    run("--data", folder, "--output", folder / "run", *model, *more)
    return folder, file


def rows_of(table):
    """The rows of a CSV by the names of their images."""
    with table.open(newline="") as opened:
        return {row["path"].rpartition("/")[2]: row for row in csv.DictReader(opened) if "across" in str(row)}


def test_predictions_need_the_same_weights(finished, capsys, tmp_path):
    folder, file = finished
    adapter = str(folder / "run" / "adapter.safetensors")
    given = [adapter, str(folder / "across"), "--output", str(tmp_path / "p.csv"), "--quiet"]
    metadata = medpeft.inspect(adapter).metadata
    assert metadata["weights"] == {"file": "w.pth", "sha256": digest(file), "head": None}
    assert (metadata["pretrained"], metadata["model_option"]) == (False, {"drop_rate": 0.1})
    assert predict.main(given) == 2
    assert (
        f"file w.pth (SHA-256 {digest(file)[:12]}…). Give that file with --weights" in capsys.readouterr().err
    )
    other = saved(timm.create_model("test_efficientnet").state_dict(), tmp_path)
    assert predict.main([*given, "--weights", str(other)]) == 2
    assert "another base" in capsys.readouterr().err
    assert predict.main([*given, "--weights", str(file)]) == 0
    found, tested = rows_of(tmp_path / "p.csv"), rows_of(folder / "run" / "predictions.csv")
    across = [name for name, row in tested.items() if row["label"] == "across"]
    assert len(across) >= 3
    for name in across:
        expected = float(tested[name]["p(down)"])
        assert float(found[name]["p(down)"]) == pytest.approx(expected, abs=1e-5)


def test_weights_are_refused_before_an_image_is_read(finished, capsys, tmp_path):
    folder, file = finished
    given = ("--data", folder, "--image-size", "32")
    assert "is no file" in messages(capsys, *given, "--weights", tmp_path / "none.pth")
    said = messages(capsys, *given, "--model", "test_vit", "--weights", file)
    assert "of the 78 tensors of this VisionTransformer before its head" in said
