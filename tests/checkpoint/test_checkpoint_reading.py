"""Files are read from wherever they are, by their header alone, by other tools, and for ever."""

import json
import socket
import sys

import pytest
import safetensors
import torch
from checkpoints import refusal, saved_file, trained
from golden.model import Golden, example
from models import make
from places import TESTS
from safetensors.torch import load_file

import medpeft
from medpeft.adapters import registry


@pytest.fixture
def file(tmp_path):
    return saved_file(tmp_path / "derm.safetensors")


def test_inspect_reads_the_header_alone(file):
    length = int.from_bytes(file.read_bytes()[:8], "little")
    shown = medpeft.inspect(file)
    data = bytearray(file.read_bytes())
    data[8 + length :] = bytes(len(data) - 8 - length)  # The tensors are other ones.

    assert medpeft.inspect(bytes(data)).to_dict()["tensors"] == shown.to_dict()["tensors"]
    assert "altered" in refusal(Golden(), bytes(data))
    said = json.loads(json.dumps(shown.to_dict()))
    assert said["methods"]["lora"]["rank"] == 8
    assert said["metadata"] == {"classes": ["a", "b", "c"], "epochs": 3}
    assert said["sites"] == [["lora", "blocks.0.attn.qkv", "weight"]]
    assert said["tensors"]["head.bias"] == {"dtype": "float32", "shape": [3]}
    assert shown.classes == ["a", "b", "c"]
    for text in ("lora+bias", "a, b, c", "epochs: 3", "blocks.0.attn.qkv", "medpeft 0", "Golden", "frozen"):
        assert text in str(shown)


def test_a_timm_model_says_its_architecture_and_the_input_it_expects(tmp_path):
    model = trained(make("vit", torch.float32), "ssf")
    medpeft.save(model, tmp_path / "a.safetensors")
    said = medpeft.inspect(tmp_path / "a.safetensors").to_dict()

    assert said["base"]["architecture"] == "vit_tiny_patch16_224"
    assert said["base"]["tag"] == "augreg_in21k_ft_in1k"
    assert said["input"]["mean"] == list(model.pretrained_cfg["mean"])


def test_a_file_loads_from_a_path_a_string_bytes_and_the_hub(file, monkeypatch):
    import huggingface_hub

    expected = medpeft.load(Golden(), file).eval()(example())
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if repository != "ward/derm":
            raise RuntimeError("404: no such repository")
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for source in (str(file), file.read_bytes(), "hf://ward/derm/a/derm.safetensors", "hf://ward/derm@v2/derm.safetensors"):
        assert torch.equal(medpeft.load(Golden(), source).eval()(example()), expected)
    assert asked == [("ward/derm", "a/derm.safetensors", None), ("ward/derm", "derm.safetensors", "v2")]
    assert "404" in refusal(Golden(), "hf://ward/other/derm.safetensors")
    assert "hf://owner/repository/file" in refusal(Golden(), "hf://ward/derm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refusal(Golden(), "hf://ward/derm/derm.safetensors")


def test_files_are_saved_read_and_loaded_without_a_socket(file, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model = medpeft.load(Golden(), file)
    medpeft.save(model, file)
    assert medpeft.inspect(file).classes is None


def test_files_of_schema_1_are_read_for_ever():
    folder = TESTS / "golden" / "schema1"
    expected = load_file(folder / "outputs.safetensors")
    assert len(expected) >= 19
    for case, output in expected.items():
        model = medpeft.load(Golden(), folder / f"{case}.safetensors").eval()
        difference = (model(example()) - output).abs().max() / output.abs().max()
        assert difference < 1e-5, f"{case} computes something else: {difference:.1e}"
        assert medpeft.inspect(folder / f"{case}.safetensors").metadata["case"] == case
        assert not torch.allclose(Golden().eval()(example()), output, atol=1e-3), f"{case} does nothing"


def test_every_built_in_method_has_a_golden_file():
    folder = TESTS / "golden" / "schema1"
    built_in = {name for name, m in registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}
    assert built_in <= {path.stem for path in folder.glob("*.safetensors")}


def test_other_tools_read_the_file(file):
    with safetensors.safe_open(file, framework="pt") as opened:
        assert "head.weight" in opened.keys()  # noqa: SIM118 - it has no __contains__
        assert json.loads(opened.metadata()["medpeft"])["schema"] == 1
