"""Files are read from wherever they are, by their header alone, by other tools, and for ever."""

import json
import socket

import pytest
import safetensors
import torch
from checkpoints import refusal, saved_file, trained
from golden.model import Golden, base_of, example
from models import make
from places import TESTS
from safetensors.torch import load_file

import medpeft
from medpeft.adapters import registry
from medpeft.checkpoint.compatibility import saved_record


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


def test_a_file_loads_from_a_path_a_string_and_bytes(file):
    expected = medpeft.load(Golden(), file).eval()(example())
    data = file.read_bytes()
    for source in (str(file), data, bytearray(data), memoryview(data)):
        assert torch.equal(medpeft.load(Golden(), source).eval()(example()), expected)


@pytest.mark.parametrize(
    "source", ["hf://ward/derm/derm.safetensors", "hf://ward/derm@v2/a/derm.safetensors", "hf://ward/derm"]
)
def test_a_reference_to_the_hub_is_told_how_to_download_it(source):
    message = refusal(Golden(), source)
    assert message.startswith(f"{source} is no path. Download the file first")
    assert "huggingface_hub.hf_hub_download('owner/repository', 'file.safetensors')" in message
    with pytest.raises(medpeft.CheckpointError, match="hf_hub_download"):
        medpeft.inspect(source)


def test_files_are_saved_read_and_loaded_without_a_socket(file, monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    model = medpeft.load(Golden(), file)
    medpeft.save(model, file)
    assert medpeft.inspect(file).classes is None


@pytest.mark.parametrize(("schema", "least"), [(1, 19), (2, 1)])
def test_files_of_every_schema_are_read_for_ever(schema, least):
    folder = TESTS / "golden" / f"schema{schema}"
    expected = load_file(folder / "outputs.safetensors")
    assert len(expected) >= least
    for case, output in expected.items():
        model = medpeft.load(base_of(case), folder / f"{case}.safetensors").eval()
        difference = (model(example()) - output).abs().max() / output.abs().max()
        assert difference < 1e-5, f"{case} computes something else: {difference:.1e}"
        assert medpeft.inspect(folder / f"{case}.safetensors").metadata["case"] == case
        assert not torch.allclose(base_of(case).eval()(example()), output, atol=1e-3), f"{case} does nothing"


def test_files_that_lack_an_option_get_the_value_that_computes_as_they_did():
    folder = TESTS / "golden" / "schema1"
    for method, older in (
        ("conv_adapter", {"place": "convolution", "activation": "relu"}),
        ("convpass", {"windows": "inside", "init": "identity"}),
    ):
        header = medpeft.inspect(folder / f"{method}.safetensors")
        assert not older.keys() & header.methods[method].keys()
        assert saved_record(header).methods[method] == {**header.methods[method], **older}


def test_files_that_name_a_place_of_later_date_act_there():
    folder = TESTS / "golden" / "schema1"
    expected = load_file(folder / "outputs.safetensors")
    assert (
        medpeft.inspect(folder / "conv_adapter_authors.safetensors").methods["conv_adapter"]["place"]
        == "authors"
    )
    assert not torch.allclose(expected["conv_adapter_authors"], expected["conv_adapter"], atol=1e-4)

    path = folder / "convpass_around.safetensors"
    assert medpeft.inspect(path).methods["convpass"]["windows"] == "around"
    model = medpeft.load(base_of(path.stem), path)
    assert set(model.blocks[0].drop_path.adapters.keys()) == {"convpass_partner"}


def test_every_built_in_method_has_a_golden_file():
    folder = TESTS / "golden" / "schema1"
    built_in = {name for name, m in registry._METHODS.items() if m.define.__module__.startswith("medpeft.")}
    assert built_in <= {path.stem for path in folder.glob("*.safetensors")}


def test_other_tools_read_the_file(file):
    with safetensors.safe_open(file, framework="pt") as opened:
        assert "head.weight" in opened.keys()  # noqa: SIM118 - it has no __contains__
        assert json.loads(opened.metadata()["medpeft"])["schema"] == 1
