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


def test_a_read_only_file_is_not_replaced(file):
    before = file.read_bytes()
    file.chmod(0o444)
    with pytest.raises(
        medpeft.CheckpointError, match="is read-only: make it writable, or choose another name"
    ):
        medpeft.save(trained(Golden(), "lora"), file)
    assert file.read_bytes() == before
    file.chmod(0o644)
    medpeft.save(trained(Golden(), "lora"), file)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.bool])
def test_a_buffer_of_any_type_is_part_of_the_base(dtype, tmp_path):
    def base(value):
        model = Golden()
        model.register_buffer("table", torch.full((3, 2), value).to(dtype))
        return model

    medpeft.save(trained(base(1), "lora"), tmp_path / "a.safetensors")
    medpeft.load(base(1), tmp_path / "a.safetensors")
    with pytest.raises(
        medpeft.CheckpointError, match=r"1 of \d+ frozen tensors are not those of its base: 'table'"
    ):
        medpeft.load(base(0), tmp_path / "a.safetensors")


class Quantised(torch.Tensor):
    """A weight of bytes and a scale that, as those of torchao, has no operators but a product."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    def __tensor_flatten__(self):
        return ["values", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values, args[0].scale)
        raise NotImplementedError(f"{func} of quantised tensors")


def test_a_quantised_weight_is_told_from_others_by_what_it_is_made_of(tmp_path):
    def base(value):
        model = Golden()
        weight = Quantised(torch.full((4, 4), value, dtype=torch.int8), torch.ones(4))
        model.packed = nn.Parameter(weight, requires_grad=False)
        return model

    medpeft.save(medpeft.apply(base(1), "lora"), tmp_path / "a.safetensors")
    medpeft.load(base(1), tmp_path / "a.safetensors")
    with pytest.raises(medpeft.CheckpointError, match="frozen tensors are not those of its base: 'packed'"):
        medpeft.load(base(2), tmp_path / "a.safetensors")


def test_a_buffer_whose_values_cannot_be_read_is_named_in_words(tmp_path):
    model = Golden()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    with pytest.raises(
        medpeft.CheckpointError, match=r"a Tensor of float32 \(torch.sparse_coo\) whose values"
    ):
        medpeft.save(medpeft.apply(model, "lora"), tmp_path / "a.safetensors")
