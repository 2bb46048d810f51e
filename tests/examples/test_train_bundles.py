"""Bundles of every task are checked, run and exported by MONAI alone, and answer as the run did."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import predict
import pytest
import torch
from dicoms import dicom
from PIL import Image
from places import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from small_masks import disc, draw_balls, draw_discs
from small_training import flags, messages, run
from trainer.exports.bundle import ANSWERS
from trainer.scripts import segmenter
from trainer.tasks import TASKS

pytestmark = pytest.mark.slow

# The fields that MONAI's specification of bundles asks for, and their types.
OF_METADATA = {
    "type": "object",
    "required": ["schema", "version", "monai_version", "pytorch_version", "numpy_version", "task"],
    "properties": {
        **{name: {"type": "string"} for name in ("schema", "version", "description", "authors", "copyright")},
        "required_packages_version": {"type": "object"},
        "network_data_format": {"type": "object", "required": ["inputs", "outputs"]},
    },
}
UNET = ["--model", "monai:UNet", "--model-option", "channels=[8,16]", "--model-option", "strides=[2]"]
RESNET = ["--model", "monai:ResNet", "--model-option", "block_inplanes=[4,4,8,8]"]
RESNET += ["--model-option", "block=basic", "--model-option", "layers=[1,1,1,1]"]
CLEAN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
PARTS = ("train", "val", "test")
# What each run's network gives, as its README says.
LOGITS = {
    "classify": "a logit for each class",
    "multilabel": "a logit for each finding",
    "ordinal": "a logit for each grade but the highest",
    "regress": "the quantity in standard deviations",
    "segment": "a logit for the background and each structure",
    "segment-3d": "a logit for the background and each structure",
}


def draw_table(folder, count=24):
    """Discs in files of 8 and of 16 bit, in grey, in colour and as DICOM, with what is to be learned of each."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        image, mask = disc(32, rng)
        # Three files of each kind, one after another: one for each part.
        kind = ("grey", "deep", "colour", "dicom")[i // 3 % 4]
        deep = image.astype(np.uint16) * 91
        name = f"{i}.png"
        if kind == "dicom":
            name = f"{i}.dcm"
            dicom(folder / name, deep, WindowCenter=9000, WindowWidth=4000)
        else:
            pixels = {"grey": image, "deep": deep, "colour": np.stack([image, image // 2, image], -1)}
            Image.fromarray(pixels[kind]).save(folder / name)
        # Both grades among the odd as among the even.
        grade = ("low", "low", "high", "high")[i % 4]
        size = int(mask.sum())
        rows.append((name, PARTS[i % 3], grade, i % 2, size > 100, size))
    table = pd.DataFrame(rows, columns=["path", "split", "grade", "odd", "large", "size"])
    table[["odd", "large"]] = table[["odd", "large"]].astype(int)
    table.to_csv(folder / "table.csv", index=False)
    return folder


def draw_volumes(folder):
    """Balls as NIfTI, with a table of their sizes, and one more of another shape, depth and orientation."""
    import nibabel

    draw_balls(folder, axes="SRA")
    sizes = [nibabel.load(folder / f"labelsTr/case{i}.nii.gz").get_fdata().sum() for i in range(10)]
    paths = [f"imagesTr/case{i}_0000.nii.gz" for i in range(10)]
    pd.DataFrame({"path": paths, "size": sizes}).to_csv(folder / "table.csv", index=False)
    turned = np.array([[0, 0.8, 0.2, 3], [-1.1, 0, 0, 5], [0, 0.1, 1.9, -4], [0, 0, 0, 1]])
    values = np.random.default_rng(1).normal(500, 200, (14, 18, 12)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, turned), folder / "imagesTr" / "turned.nii.gz")
    return folder


@pytest.fixture(scope="module")
def bundles(stripes, tmp_path_factory):
    """Folder with a finished run for each task, of whose bundle MONAI has written `answers`."""
    pytest.importorskip("nibabel")
    top = tmp_path_factory.mktemp("bundles")
    (top / "table").mkdir()
    table = draw_table(top / "table")
    discs, volumes = draw_discs(top / "discs", side=40, value=300), draw_volumes(top / "volumes")
    labelled = ["--data", table / "table.csv"]
    given = {
        "classify": ["--method", "ssf"],
        "multilabel": [*labelled, "--finding-column", "odd", "--finding-column", "large", "--method", "ssf"],
        "ordinal": [*labelled, "--label-column", "grade", "--grade", "low", "--grade", "high"],
        "regress": ["--data", volumes / "table.csv", "--label-column", "size", *RESNET, "--coverage", "0.5"],
        "segment": ["--data", discs, "--method", "lora", "--export", "merged"],
        "segment-3d": ["--data", volumes, *UNET, "--patch-size", 8, "--method", "full", "--skip-broken"],
    }
    images = {"classify": stripes, "regress": volumes, "segment": discs / "images"}
    images["segment-3d"] = volumes / "imagesTr"
    places = []
    for name, more in given.items():
        words = ["--task", name.partition("-")[0], "--epochs", "1", "--quiet", "--image-size", 16, *more]
        run(*flags(stripes, top / name), *words, "--lr", "1e-2", "--batch-size", 4, "--export", "bundle")
        places.append(f"{top / name}/export/bundle:{images.get(name, table)}:{top / name}/answers")
    schema = top / "schema.json"
    schema.write_text(json.dumps(OF_METADATA))
    alone = ROOT / "tests" / "support" / "monai_alone.py"
    command = [sys.executable, alone, schema, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=CLEAN)
    assert "ALL CHECKED" in done.stdout, done.stderr
    return top


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("classify", ["p(across)", "p(down)"]),
        ("multilabel", ["p(odd)", "p(large)"]),
        ("ordinal", ["prediction", "p(low)", "p(high)"]),
        ("regress", ["prediction", "low", "high"]),
    ],
)
def test_a_table_of_a_bundle_has_what_the_run_predicted(bundles, task, columns):
    expected = pd.read_csv(bundles / task / "predictions.csv").set_index("path")[columns]
    found = pd.read_csv(bundles / task / "answers" / "predictions.csv").set_index("path")
    assert list(found.columns) == columns
    assert len(found) > len(expected) > 1
    pd.testing.assert_frame_equal(found.loc[expected.index], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "folder"), [("segment", "discs/images"), ("segment-3d", "volumes/imagesTr")]
)
def test_masks_of_a_bundle_are_those_of_predict_on_the_pixels_of_each_file(bundles, tmp_path, task, folder):
    import nibabel

    given = [bundles / task / "adapter.safetensors", bundles / folder, "--output", tmp_path / "p.csv"]
    assert predict.main([*map(str, given), "--quiet"]) == 0
    masks = tmp_path / "p-masks"
    there = [path for path in masks.rglob("*") if path.is_file()]
    assert len(there) == {"segment": 16, "segment-3d": 11}[task]
    values = set()
    for path in there:
        answer = bundles / task / "answers" / path.relative_to(masks)
        if task == "segment":
            found, expected = (np.asarray(Image.open(file)) for file in (answer, path))
        else:
            written, like = nibabel.load(answer), nibabel.load(path)
            assert np.allclose(written.affine, like.affine)
            found, expected = np.asarray(written.dataobj), np.asarray(like.dataobj)
        assert found.dtype == expected.dtype == {"segment": "uint16", "segment-3d": "uint8"}[task]
        assert found.shape == expected.shape
        # Where two logits are equal but for rounding.
        assert (found != expected).mean() < 1e-3
        values |= set(np.unique(expected))
    assert values == {"segment": {0, 300}, "segment-3d": {0, 1}}[task]


@pytest.mark.parametrize(("task", "folder"), [("classify", None), ("segment", "discs/images")])
def test_the_command_of_monai_writes_the_same_answers(bundles, stripes, tmp_path, task, folder):
    pytest.importorskip("fire")
    pytest.importorskip("ignite")
    images = bundles / folder if folder else stripes
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json"]
    command += ["--dataset_dir", str(images), "--output_dir", str(tmp_path)]
    bundle = bundles / task / "export" / "bundle"
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=bundle, env=CLEAN)
    assert done.returncode == 0, done.stderr
    answers = [path for path in (bundles / task / "answers").rglob("*") if path.is_file()]
    assert answers
    for expected in answers:
        found = tmp_path / expected.relative_to(bundles / task / "answers")
        if found.suffix == ".csv":
            pd.testing.assert_frame_equal(pd.read_csv(found), pd.read_csv(expected), atol=1e-5)
        else:
            assert np.array_equal(np.asarray(Image.open(found)), np.asarray(Image.open(expected)))


def test_a_bundle_says_what_its_network_takes_and_gives(bundles):
    metadata = {}
    for task in ("classify", "ordinal", "regress", "segment-3d"):
        file = bundles / task / "export" / "bundle" / "configs" / "metadata.json"
        metadata[task] = json.loads(file.read_text())
    formats = metadata["segment-3d"]["network_data_format"]
    for tensor in (formats["inputs"]["image"], formats["outputs"]["pred"]):
        assert tensor["spatial_shape"] == [8, 8, 8]
        assert tensor["is_patch_data"]
    assert formats["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "foreground"}
    assert metadata["ordinal"]["network_data_format"]["outputs"]["pred"]["num_channels"] == 1
    assert metadata["regress"]["fitted"]["interval"]["coverage"] == 0.5
    assert not metadata["classify"]["network_data_format"]["inputs"]["image"]["is_patch_data"]
    assert metadata["classify"]["task"] == "Classification of images: across, down"


def test_every_task_has_an_answer_in_bundles():
    assert ANSWERS.keys() == TASKS.keys()


def test_the_output_of_the_network_alone_is_told_from_the_answers(bundles):
    for task, words in LOGITS.items():
        folder = bundles / task / "export" / "bundle"
        metadata = json.loads((folder / "configs" / "metadata.json").read_text())
        assert metadata["network_data_format"]["outputs"]["pred"]["type"] != "probabilities"
        readme = (folder / "docs" / "README.md").read_text()
        assert f"The network alone, which `ckpt_export` writes, gives {words}" in readme


def test_what_is_to_be_filled_in_is_marked(bundles):
    for task in LOGITS:
        for name in ("LICENSE", "docs/README.md"):
            text = (bundles / task / "export" / "bundle" / name).read_text()
            assert "to be filled in by whoever" in text


def test_the_trainer_is_no_part_of_a_bundle(bundles):
    for task in LOGITS:
        folder = bundles / task / "export" / "bundle"
        for file in (folder / "configs" / "inference.json", *folder.glob("scripts/*.py")):
            assert "import medpeft" not in file.read_text()
            assert "from trainer" not in file.read_text()
        assert not list(folder.rglob("__pycache__"))


def test_the_header_of_a_merged_segmenter_says_how_it_is_built(bundles):
    file = bundles / "segment" / "export" / "merged.safetensors"
    with safe_open(file, "pt") as opened:
        definition = json.loads(opened.metadata()["network"])
    assert definition.pop("_target_") == "scripts.segmenter.build"
    assert definition == {"model_name": "test_efficientnet", "outputs": 2}
    network = segmenter.build(**definition)
    network.load_state_dict(load_file(file))
    bundled = torch.load(bundles / "segment" / "export" / "bundle" / "models" / "model.pt")
    assert all(torch.equal(bundled[name], value) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--model", "local-dir:/nowhere"], "built from a folder of this machine. Take merged or onnx"),
        (["--model-option", "act_layer=torch.nn.SiLU"], "act_layer=torch.nn.SiLU is a class of Python"),
    ],
)
def test_a_network_that_others_could_not_build_is_refused_before_an_image_is_read(
    stripes, tmp_path, capsys, monkeypatch, given, told
):
    monkeypatch.setattr("trainer.work.read_data", None)
    assert told in messages(capsys, *flags(stripes, tmp_path / "run"), *given, "--export", "bundle")
