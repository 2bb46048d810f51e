"""Adapters beside weights that torchao or bitsandbytes has quantised: they train, save and load; weights stay."""

import copy
import functools
import warnings

import pytest
import timm
import torch
from every_method import perturb
from torch import nn

import medpeft

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain():
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, embed_dim=64, num_heads=2
    )


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.blocks, quantization.Int8WeightOnlyConfig())
    return model


def by_bitsandbytes(model, make):
    for name, layer in list(model.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            packed = make(layer.in_features, layer.out_features)
            packed.load_state_dict(layer.state_dict())
            parent, _, child = name.rpartition(".")
            setattr(model.blocks.get_submodule(parent), child, packed.to("cpu"))  # Here it packs its weight.
    return model


def eight_bits(model):
    library = pytest.importorskip("bitsandbytes")
    return by_bitsandbytes(
        model, lambda inputs, outputs: library.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False)
    )


def four_bits(model):
    library = pytest.importorskip("bitsandbytes")
    return by_bitsandbytes(
        model, lambda inputs, outputs: library.nn.Linear4bit(inputs, outputs, compute_dtype=torch.float32)
    )


KINDS = {"torchao": by_torchao, "8 bits": eight_bits, "4 bits": four_bits}
pytestmark = [
    pytest.mark.parametrize("kind", KINDS),
    # bitsandbytes rounds inputs to float16 in 8 bits, and says so of float32 ones.
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

BESIDE = {
    "lora": {"rank": 2},
    "ssf": {},
    "bias": {},
    "adaptformer": {"bottleneck": 4, "dropout": 0.0},
    "houlsby": {"bottleneck": 4},
    "vpt_deep": {"tokens": 2},
    "prefix": {"tokens": 2},
    "oft": {"block_size": 4},
    "lst": {"reduction": 2},
}


@functools.cache
def _quantised(kind):
    with warnings.catch_warnings():  # What a library warns about while it is imported is not ours.
        warnings.simplefilter("ignore")
        return KINDS[kind](plain())


def quantised(kind):
    return copy.deepcopy(_quantised(kind))


@pytest.mark.parametrize("method", BESIDE)
def test_what_acts_beside_the_weights_trains_saves_and_loads(kind, method, tmp_path):
    model = perturb(medpeft.apply(quantised(kind), method, **BESIDE[method]).train())
    trained = [p for p in model.parameters() if p.requires_grad]
    before = model(X).square().mean()
    before.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    torch.optim.SGD(trained, lr=0.01).step()
    assert model(X).square().mean() < before
    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(quantised(kind), tmp_path / "a.safetensors")
    torch.testing.assert_close(loaded(X), model(X), rtol=1e-3, atol=1e-3)
    with medpeft.disabled(model):
        torch.testing.assert_close(model(X), quantised(kind)(X), rtol=1e-3, atol=1e-3)
    medpeft.remove(model)
    torch.testing.assert_close(model(X), quantised(kind)(X), rtol=1e-3, atol=1e-3)


def test_check_runs_and_leaves_the_model_able_to_train(kind):
    model = medpeft.apply(quantised(kind), "lora+ssf+adaptformer")
    assert medpeft.check(model, X).tensors > 10
    model.train()(X).sum().backward()


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {"dora": True}), ("lora", {"init": "pissa"}), ("svdiff", {}), ("loha", {}), ("shira", {})],
)
def test_what_needs_the_weight_is_refused_in_words(kind, method, options):
    model = quantised(kind)
    keys = list(model.state_dict())
    with pytest.raises(
        medpeft.MedpeftError,
        match=r"weight of blocks\.0\S+, which is quantised: exclude it.*before .*quant",
    ):
        medpeft.apply(model, method, **options)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("method", ["full", "attention"])
def test_what_would_train_the_weight_is_refused_in_words(kind, method):
    with pytest.raises(medpeft.MedpeftError, match=r"would train blocks\.0\.\S+weight, which is quantised"):
        medpeft.apply(quantised(kind), method)


@pytest.mark.parametrize("merge", [medpeft.merge, lambda model: medpeft.merged(model).__enter__()])
def test_merging_is_refused_in_words_and_goes_by_way_of_the_float_base(kind, merge, tmp_path):
    model = perturb(medpeft.apply(quantised(kind), "lora").eval())
    with pytest.raises(
        medpeft.MedpeftError, match=r"is quantised or of integers.*merge there, then quantise"
    ):
        merge(model)
    medpeft.save(model, tmp_path / "a.safetensors")
    base = plain().eval()
    with pytest.raises(medpeft.CheckpointError, match="was trained on another base"):
        medpeft.load(base, tmp_path / "a.safetensors")
    medpeft.load(base, tmp_path / "a.safetensors", check_base=False)
    adapted = base(X)
    assert (adapted - model(X)).abs().max() < 0.15 * adapted.abs().max()
    torch.testing.assert_close(medpeft.merge(base)(X), adapted)


def test_an_adapter_of_the_float_base_is_loaded_on_request(kind, tmp_path):
    model = perturb(medpeft.apply(plain(), "lora").eval())
    medpeft.save(model, tmp_path / "a.safetensors")
    with pytest.raises(medpeft.CheckpointError, match="was trained on another base"):
        medpeft.load(quantised(kind), tmp_path / "a.safetensors")
    loaded = medpeft.load(quantised(kind).eval(), tmp_path / "a.safetensors", check_base=False)
    assert (loaded(X) - model(X)).abs().max() < 0.15 * model(X).abs().max()


def test_evaluation_does_not_change_the_base(kind, tmp_path):
    model = medpeft.apply(quantised(kind), "lora")
    with torch.no_grad():
        model.eval()(X)  # On some CPUs bitsandbytes packs its weights in another order then.
    medpeft.save(copy.deepcopy(model), tmp_path / "a.safetensors")
    medpeft.load(quantised(kind), tmp_path / "a.safetensors")
    medpeft.remove(model)
