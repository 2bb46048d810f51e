"""Exported models predict without medpeft what the run predicted."""

import csv
import json
import tomllib
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from places import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from small_masks import draw_discs
from small_training import flags, messages, run
from trainer.data.batches import Preprocessing
from trainer.errors import TrainerError
from trainer.exports.bundle import needed
from trainer.exports.kinds import KINDS
from trainer.exports.model import build
from trainer.files.images import load


@pytest.fixture(scope="module")
def finished(stripes, tmp_path_factory):
    """A finished run, exported by the same command given once more."""
    output = tmp_path_factory.mktemp("parent") / "run"
    given = flags(stripes, output, "--method", "ssf", "--quiet", "--image-size", "32")
    record = run(*given)
    assert run(*given, "--export", "merged") == record
    return output


def probabilities(output):
    with (output / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["path"]: [float(row["p(across)"]), float(row["p(down)"])] for row in rows}


def inputs_of(stripes, output, header):
    """The inputs of the test's images, by what the header says."""
    names = list(probabilities(output))
    preprocessing = Preprocessing.from_metadata(
        {"preprocessing": json.loads(header["preprocessing"])}, output
    )
    loaded = load([stripes / name for name in names], preprocessing.image_size, stored=preprocessing.stored)
    return preprocessing(loaded.pixels)


def test_merged_weights_are_loaded_by_timm_and_predict_the_same(stripes, finished):
    file = finished / "export" / "merged.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    network = json.loads(header["network"])
    assert network.pop("_target_") == "timm.create_model"
    model = timm.create_model(**network).eval()
    model.load_state_dict(load_file(file))
    temperature = json.loads(header["fitted"])["temperature"]
    with torch.no_grad():
        found = (model(inputs_of(stripes, finished, header)) / temperature).softmax(1)
    assert np.allclose(found, list(probabilities(finished).values()), atol=1e-5)
    assert json.loads(header["classes"]) == ["across", "down"]


def test_what_is_there_is_not_written_again(stripes, finished):
    file = finished / "export" / "merged.safetensors"
    before = file.stat().st_mtime_ns
    run(*flags(stripes, finished, "--method", "ssf", "--quiet", "--image-size", "32"), "--export", "merged")
    assert file.stat().st_mtime_ns == before


def test_the_onnx_file_predicts_the_same_for_any_number_of_images(stripes, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    # A method that cannot be merged: its adapters are exported as they are.
    given = flags(
        stripes, tmp_path / "run", "--method", "houlsby", "--quiet", "--export", "onnx", "--epochs", "1"
    )
    run(*given, "--model", "test_vit", "--image-size", "64")
    file = tmp_path / "run" / "export" / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    header = session.get_modelmeta().custom_metadata_map
    inputs = inputs_of(stripes, tmp_path / "run", header)
    (outputs,) = session.run(None, {"images": inputs.numpy()})
    (first,) = session.run(None, {"images": inputs[:1].numpy()})
    found = (torch.tensor(outputs) / json.loads(header["fitted"])["temperature"]).softmax(1)
    assert np.allclose(found, list(probabilities(tmp_path / "run").values()), atol=1e-4)
    assert np.allclose(first, outputs[:1], atol=1e-5)


def test_a_network_for_one_size_is_built_for_that_of_its_input(stripes, tmp_path):
    given = flags(
        stripes, tmp_path / "run", "--method", "lora", "--quiet", "--epochs", "1", "--export", "merged"
    )
    given += [
        "--model",
        "swin_tiny_patch4_window7_224",
        "--image-size",
        "64",
        "--model-option",
        "embed_dim=8",
    ]
    given += ["--model-option", "depths=[1,1,1,1]", "--model-option", "num_heads=[1,1,1,1]"]
    # Its tensors have the same shapes for 224 pixels.
    run(*given, "--model-option", "window_size=2")
    file = tmp_path / "run" / "export" / "merged.safetensors"
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    network = build(json.loads(header["network"])).eval()
    network.load_state_dict(load_file(file))
    with torch.no_grad():
        logits = network(inputs_of(stripes, tmp_path / "run", header))
    found = (logits / json.loads(header["fitted"])["temperature"]).softmax(1)
    assert np.allclose(found, list(probabilities(tmp_path / "run").values()), atol=1e-5)


def test_a_merged_network_that_timm_cannot_build_is_refused_by_name(stripes, tmp_path, capsys):
    given = flags(stripes, tmp_path / "run", "--method", "ssf", "--quiet", "--epochs", "1")
    told = messages(capsys, *given, "--model", "test_resnet", "--export", "merged")
    assert "The merged test_resnet cannot be built without medpeft: it differs in conv1.6.bias" in told
    assert "Take --export onnx" in told
    assert (tmp_path / "run" / "metrics.json").exists()
    assert not list((tmp_path / "run" / "export").iterdir())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--method", "houlsby", "--export", "merged"], "needs a method that merges, and houlsby does not"),
        (["--export", "bundle", "--devices", "2", "--strategy", "fsdp2"], "--strategy fsdp2 shards them"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_an_image_is_read(
    stripes, tmp_path, capsys, monkeypatch, given, told
):
    monkeypatch.setattr("trainer.work.read_data", None)
    assert told in messages(capsys, *flags(stripes, tmp_path / "run"), *given)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_nothing_stays_of_an_export_that_fails(stripes, finished, capsys, monkeypatch, kind):
    def write(trained, path):
        if kind == "folder":
            path.mkdir()
            path = path / "file"
        path.write_text("half of it")
        raise TrainerError("It computes something else. It is not kept.")

    monkeypatch.setitem(KINDS, "bundle", ("bundle", write))
    given = flags(stripes, finished, "--method", "ssf", "--quiet", "--image-size", "32", "--export", "bundle")
    assert "It is not kept" in messages(capsys, *given)
    assert [path.name for path in (finished / "export").iterdir()] == ["merged.safetensors"]


def test_an_onnx_file_that_computes_something_else_is_refused_and_not_kept(
    stripes, finished, capsys, monkeypatch
):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("trainer.exports.onnx.run_onnx", lambda path, images: torch.zeros(len(images), 2))
    given = flags(stripes, finished, "--method", "ssf", "--quiet", "--image-size", "32", "--export", "onnx")
    assert "The ONNX file computes something else than the model" in messages(capsys, *given)
    assert [path.name for path in (finished / "export").iterdir()] == ["merged.safetensors"]


def test_a_bundle_of_volumes_needs_nibabel_also_where_it_is_not_installed(monkeypatch):
    def version(name):
        if name == "nibabel":
            raise PackageNotFoundError(name)
        return "1.2.3"

    monkeypatch.setattr("trainer.exports.bundle.version", version)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    least = project["optional-dependencies"]["nifti"][0].partition(">=")[2]
    assert needed(SimpleNamespace(takes_volumes=True))["nibabel"] == least
    assert "nibabel" not in needed(SimpleNamespace(takes_volumes=False))


def test_a_missing_package_is_named_with_what_installs_it(stripes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trainer.exports.kinds.NEEDED", ("onnx", "no_such_package"))
    told = messages(capsys, *flags(stripes, tmp_path / "run"), "--export", "onnx")
    assert "--export onnx needs no_such_package: pip install 'medpeft[onnx]'" in told


def test_a_transformer_of_monai_trained_on_patches_is_exported_and_adapted_again(tmp_path):
    data = draw_discs(tmp_path / "discs", count=8, side=40)
    given = ["--task", "segment", "--data", data, "--model", "monai:SwinUNETR", "--batch-size", 8]
    given += ["--model-option", "feature_size=12", "--model-option", "depths=[1,1,1,1]"]
    given += ["--model-option", "window_size=4", "--model-option", "norm_name=['group',{'num_groups':4}]"]
    # It takes the side of a patch, and not that of an image.
    given += ["--image-size", 40, "--patch-size", 32, "--epochs", 1, "--quiet", "--no-figures"]
    base = tmp_path / "base"
    run(*given, "--method", "full", "--no-pretrained", "--export", "merged", "--output", base)
    file = base / "export" / "merged.safetensors"
    with safe_open(file, "pt") as opened:
        definition = json.loads(opened.metadata()["network"])
    network = build(definition).eval()
    network.load_state_dict(load_file(file))
    given += ["--method", "lora", "--weights", file, "--export", "merged", "--output", tmp_path / "again"]
    record = run(*given)
    assert record["trainable"] < 0.1 * record["parameters"]
    merged = load_file(tmp_path / "again" / "export" / "merged.safetensors")
    changed = [name for name, value in load_file(file).items() if not torch.equal(merged[name], value)]
    assert any("attn.qkv" in name for name in changed)
    assert all("attn.qkv" in name or name.startswith("out.") for name in changed)
