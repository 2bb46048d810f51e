"""Functions for files of other tools say what is wrong with a model or a path that is none."""

import pytest
from torch import nn

import medpeft
from medpeft import interchange

WRITERS = [interchange.to_peft, interchange.to_diffusers, interchange.to_kohya]
READERS = [interchange.from_peft, interchange.from_diffusers, interchange.from_kohya]


@pytest.mark.parametrize("function", [*WRITERS, *READERS])
@pytest.mark.parametrize("path", [None, 5, b"lora.safetensors"])
def test_what_is_no_path_is_named(function, path):
    model = nn.Sequential(nn.Linear(4, 4))
    if function in WRITERS:
        medpeft.apply(model, "lora", target="0", head=None)
    with pytest.raises(medpeft.CheckpointError, match="must be a path, as text or a pathlib"):
        function(model, path)


@pytest.mark.parametrize("function", [*WRITERS, *READERS])
def test_what_is_no_model_is_named(function, tmp_path):
    with pytest.raises(medpeft.MedpeftError, match=r"int is no torch\.nn\.Module"):
        function(5, tmp_path)
    with pytest.raises(medpeft.MedpeftError, match="exchange the two"):
        function(tmp_path, nn.Linear(2, 2))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_peft_gets_both_files_or_none(name, tmp_path):
    model = medpeft.apply(nn.Sequential(nn.Linear(4, 4)), "lora", target="0", head=None)
    (tmp_path / name).mkdir()
    with pytest.raises(medpeft.CheckpointError, match=f"{name} is no file that can be written over"):
        interchange.to_peft(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).rmdir()
    interchange.to_peft(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
