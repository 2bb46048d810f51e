"""A file loads exactly where it belongs or nowhere, and everything that stands against it is named."""

import copy

import pytest
import torch
from checkpoints import bits, refusal, same, saved_file, trained
from golden.model import Golden, example
from models import make
from safetensors.torch import load_file
from torch import nn

import medpeft
from medpeft.surgery import plan as plan_module


@pytest.fixture
def file(tmp_path):
    return saved_file(tmp_path / "derm.safetensors")


def test_a_model_adapted_in_another_way_is_told_what_differs(file):
    message = refusal(trained(Golden(), {"lora": {"rank": 2}, "bias": {}}), file)
    assert "lora: rank=8 in the file, 2 here" in message
    message = refusal(trained(Golden(), "lora"), file)
    assert "method: lora+bias in the file, lora here" in message
    message = refusal(trained(Golden(), "lora+bias", target="*", head="head"), file)
    assert (
        "adapters at 'layer.conv1.weight'" in message or "adapters at 'blocks.0.attn.proj.weight'" in message
    )
    message = refusal(trained(Golden(), "lora+bias", batchnorm="adapt"), file)
    assert "batchnorm: 'frozen' in the file, 'adapt' here" in message


def test_another_base_is_refused_and_the_part_that_differs_is_named(file):
    other = Golden()
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight[2, 3] += 1e-3
    message = refusal(other, file)
    assert "values: 1 of 13 frozen tensors are not those of its base: 'blocks.0.mlp.fc1.weight'" in message
    assert "check_base=False" in message
    medpeft.load(other, file, check_base=False)

    wide = Golden(width=8)
    message = refusal(wide, file)
    assert "shapes: 'stem.weight' is 4x1x3x3 float32 in the file's base, 8x1x3x3 float32 here" in message
    message = refusal(wide, file, check_base=False)
    assert "'blocks.0.attn.qkv.adapters.lora.down': (16, 4) in the file, (16, 8) in the model" in message
    assert "'head.weight': (3, 4) in the file, (3, 8) in the model" in message

    message = refusal(Golden().half(), file)
    assert "float32 in the file's base, 4x1x3x3 float16 here" in message

    message = refusal(make("resnet", torch.float32), file)
    assert "architecture: Golden in the file, ResNet (resnet26.bt_in1k) here" in message
    message = refusal(make("resnet", torch.float32), file, check_base=False)
    assert "'lora+bias' fits no 'blocks.0.attn.qkv.weight'" in message


def test_the_base_digest_finds_a_permuted_weight_and_ignores_adaptation(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(512, 768), nn.Linear(768, 4))
    medpeft.save(trained(copy.deepcopy(base), "lora", target="0", head="1"), tmp_path / "a.safetensors")
    medpeft.load(trained(copy.deepcopy(base), "lora", target="0", head="1"), tmp_path / "a.safetensors")
    with torch.no_grad():
        base[0].weight.copy_(base[0].weight.flip(1))
    assert "'0.weight'" in refusal(base, tmp_path / "a.safetensors")


def test_another_number_of_classes_names_num_classes(file):
    message = refusal(Golden(classes=7), file)
    assert "'head.weight': (3, 4) in the file, (7, 4) in the model" in message
    assert "'head.bias': (3,) in the file, (7,) in the model" in message
    assert "num_classes=3" in message


def test_the_head_can_be_skipped_or_drawn_anew_for_another_task(file):
    model = Golden(classes=7)
    own = model.head.weight.detach().clone()
    medpeft.load(model, file, head="skip")
    assert torch.equal(model.head.weight, own)
    assert model.head.weight.requires_grad

    models = Golden(classes=7), Golden(classes=7)
    state = torch.random.get_rng_state()
    drawn = [medpeft.load(model, file, head="reinit").head.weight for model in models]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], own)
    with pytest.raises(medpeft.MedpeftError, match="'strict', 'skip', 'reinit'"):
        medpeft.load(Golden(), file, head="new")


def test_a_backbone_without_a_head_takes_the_adapters(file):
    model = Golden()
    model.head = nn.Identity()
    medpeft.load(model, file, head="skip")
    whole = medpeft.load(Golden(), file)
    assert torch.equal(whole.head(model.eval()(example())), whole.eval()(example()))


def test_a_swap_can_skip_the_head_too(file):
    model = trained(Golden(), "lora+bias", seed=4)
    own = model.head.weight.detach().clone()
    medpeft.load(model, file, head="skip")
    assert torch.equal(model.head.weight, own)
    assert torch.equal(model.stem.bias, medpeft.load(Golden(), file).stem.bias)


def test_every_misfit_is_listed_in_one_error(file, tmp_path):
    from medpeft.checkpoint.header import KEY, compose
    from medpeft.checkpoint.writing import write

    header, tensors = medpeft.inspect(file), load_file(file)
    tensors["extra"] = tensors.pop("stem.bias")
    tensors["head.bias"] = torch.zeros(5)
    tensors["layer.bn1.bias"] = torch.zeros(4, dtype=torch.int64)
    said = {k: v for k, v in header.document.items() if k != "content"}
    write(str(tmp_path / "b.safetensors"), tensors, {KEY: compose(said, tensors)})

    message = refusal(Golden(), tmp_path / "b.safetensors")
    assert "'stem.bias': in the model, missing in the file" in message
    assert "'extra': in the file, the model has no such tensor" in message
    assert "'head.bias': (5,) in the file, (3,) in the model" in message
    assert "'layer.bn1.bias': int64 in the file, float32 in the model" in message


def test_the_meta_device_is_refused_with_the_reason(file, tmp_path):
    with torch.device("meta"):
        blank = Golden()
    with pytest.raises(
        medpeft.CheckpointError, match=r"meta device, which holds no values: load the base's weights first"
    ):
        medpeft.load(blank, file)
    assert not hasattr(blank.blocks[0].attn.qkv, "adapters")
    with pytest.raises(medpeft.CheckpointError, match="meta device"):
        medpeft.save(medpeft.apply(blank, "lora"), tmp_path / "a.safetensors")
    assert not (tmp_path / "a.safetensors").exists()


def test_wrapped_models_are_told_where_the_adapted_one_is(file):
    wrapped = nn.Sequential(trained(Golden(), "lora+bias"))
    assert "load into its '0'" in refusal(wrapped, file)
    with pytest.raises(medpeft.MedpeftError, match="its '0' is: pass that"):
        medpeft.save(wrapped, file)


def test_a_method_of_ones_own_must_be_registered_before_loading(tmp_path, own_registry, monkeypatch):
    @medpeft.register("shifted")
    class Shifted(medpeft.Adapter):
        """A shift of every linear layer's output."""

        layers = (nn.Linear,)

        def __init__(self, site, *, sizes=(1, 2)):
            super().__init__(site)
            self.shift = nn.Parameter(torch.zeros(site.host.shape[0]))

        def forward(self, x, y):
            return y + self.shift

    model = trained(Golden(), "shifted")
    medpeft.save(model, tmp_path / "a.safetensors")
    assert torch.equal(medpeft.load(Golden(), tmp_path / "a.safetensors").eval()(example()), model(example()))
    medpeft.load(model, tmp_path / "a.safetensors")

    from medpeft.adapters import registry

    monkeypatch.delitem(registry._METHODS, "shifted")
    message = refusal(Golden(), tmp_path / "a.safetensors")
    assert "Unknown method 'shifted'" in message
    assert "import the file that registers it" in message


def test_a_copy_that_fails_half_way_leaves_the_model_as_it_was(file, monkeypatch):
    from medpeft.adapters import aside

    like = aside.like

    for model in (Golden(), trained(Golden(), "lora+bias", seed=9)):
        fits = []

        def wrong(value, own, fits=fits):
            fits.append(own)
            return like(value, own) if len(fits) < 4 else torch.zeros(own.numel() + 1)

        monkeypatch.setattr(aside, "like", wrong)
        before = bits(model)
        with pytest.raises(RuntimeError):
            medpeft.load(model, file)
        assert same(before, bits(model))


def test_the_order_in_which_a_union_is_written_does_not_matter(tmp_path):
    model = trained(Golden(), "ssf+lora")
    medpeft.save(model, tmp_path / "a.safetensors")
    other = medpeft.load(medpeft.apply(Golden(), "lora+ssf"), tmp_path / "a.safetensors")
    fresh = medpeft.load(Golden(), tmp_path / "a.safetensors")
    with torch.no_grad():
        expected = model.eval()(example())
        assert torch.equal(other.eval()(example()), expected)
        assert torch.equal(fresh.eval()(example()), expected)


def test_a_file_whose_adapters_act_in_another_order_is_refused_where_they_act_already(tmp_path, monkeypatch):
    monkeypatch.setattr(
        plan_module, "in_order", list
    )  # Files of earlier versions keep the order of the union.
    model = trained(Golden(), "ssf+lora")
    medpeft.save(model, tmp_path / "a.safetensors")
    monkeypatch.undo()
    fresh = medpeft.load(Golden(), tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh.eval()(example()), model.eval()(example()))
    message = refusal(medpeft.apply(Golden(), "ssf+lora"), tmp_path / "a.safetensors")
    assert "order of adapters: ssf, lora in the file, lora, ssf here" in message
