"""What a file could not bring back is not saved, and the reason is given."""

import pytest
import torch
from checkpoints import saved_file, trained
from golden.model import Golden
from torch import nn

import medpeft


@pytest.fixture
def file(tmp_path):
    return saved_file(tmp_path / "derm.safetensors")


@pytest.mark.parametrize(
    ("metadata", "part"),
    [
        ({"loss": float("nan")}, "metadata['loss']"),
        ({"folds": [{"model": nn.Identity()}]}, "metadata['folds'][0]['model']"),
        ({"classes": {1: "a"}}, "metadata['classes']"),
        ({"classes": [1, 2]}, "names of the classes"),
        (["a"], "must be a dict"),
        ({"when": torch.tensor(1.0)}, "metadata['when']"),
    ],
)
def test_metadata_that_is_no_json_is_refused_by_name(metadata, part, file):
    before = file.read_bytes()
    with pytest.raises(medpeft.CheckpointError) as caught:
        medpeft.save(trained(Golden(), "lora"), file, metadata=metadata)
    assert part in str(caught.value)
    assert file.read_bytes() == before


def test_metadata_that_contains_itself_or_is_huge_is_refused(tmp_path):
    loop = {}
    loop["again"] = loop
    model = trained(Golden(), "lora")
    with pytest.raises(medpeft.CheckpointError, match="deep"):
        medpeft.save(model, tmp_path / "a", metadata=loop)
    with pytest.raises(medpeft.CheckpointError, match="shorten metadata"):
        medpeft.save(model, tmp_path / "a", metadata={"log": "x" * 2**22})
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_as_apply_left_it_is_not_saved(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(medpeft.MedpeftError, match="not adapted"):
        medpeft.save(Golden(), path)
    model = trained(Golden(), "lora+bias")
    for away in (medpeft.disabled, medpeft.merged):
        with away(model), pytest.raises(medpeft.CheckpointError, match="Within medpeft"):
            medpeft.save(model, path)
    with (
        medpeft.disabled(trained(Golden(), "bias")) as off,
        pytest.raises(medpeft.CheckpointError, match="Within"),
    ):
        medpeft.save(off, path)
    model.blocks[0].attn.qkv = nn.Linear(4, 12)
    with pytest.raises(medpeft.CheckpointError, match=r"'blocks\.0\.attn\.qkv', which 'lora\+bias' trains"):
        medpeft.save(model, path)
    model = trained(Golden(), "ssf")
    model.head = nn.Identity()
    with pytest.raises(
        medpeft.CheckpointError, match=r"'head\.weight' and 1 more.*was a layer or the head replaced"
    ):
        medpeft.save(model, path)
    assert not path.exists()


def test_options_that_are_no_json_are_refused(tmp_path, own_registry):
    @medpeft.register("odd")
    def odd(name, parameter, layer, *, only=()):
        """A parameter that an object names."""
        return True

    with pytest.raises(medpeft.CheckpointError, match="the options of 'odd'"):
        medpeft.save(medpeft.apply(Golden(), "odd", only=torch.float16), tmp_path / "a.safetensors")


@pytest.mark.parametrize("method", ["lora+bias", "linear_probe"])
def test_parameters_that_train_and_are_not_saved_are_refused(method, tmp_path):
    model = trained(Golden(), method).requires_grad_(True)
    with pytest.raises(
        medpeft.CheckpointError, match=r"'stem\.weight' and \d+ more would train, though apply froze it"
    ):
        medpeft.save(model, tmp_path / "adapter.safetensors")
    assert not list(tmp_path.iterdir())

    model = trained(Golden(), method)
    model.auxiliary = torch.nn.Linear(2, 2)
    with pytest.raises(medpeft.CheckpointError, match=r"'auxiliary\.weight' and 1 more would train"):
        medpeft.save(model, tmp_path / "adapter.safetensors")
