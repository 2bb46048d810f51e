"""Layers that no adapter acts rightly on are refused with the way out, in any method; never passed over in silence."""

import copy

import pytest
import torch
from models import randomise
from single_layers import LAYERS, OPTIONS, Block, Holder
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from traces import same, tensors, trace

import medpeft

ADDITIVE = [
    (layer, method)
    for layer in ("linear", "conv2d", "transposed 2d", "layer norm", "attention")
    for method in LAYERS[layer][2].split()
    if method not in ("attention", "bias", "bitfit", "full", "ln", "norm", "prefix")
]
NORMALISED = {
    "weight_norm": (weight_norm, "remove_weight_norm"),
    "spectral_norm": (spectral_norm, "remove_spectral_norm"),
    "parametrized weight_norm": (parametrizations.weight_norm, "parametrize.remove_parametrizations"),
    "parametrized spectral_norm": (parametrizations.spectral_norm, "parametrize.remove_parametrizations"),
    "pruned": (lambda layer, name: prune.random_unstructured(layer, name, 0.5), "prune.remove"),
}


def refused(model, method, message, **options):
    """Assert that a method is refused, and leaves the model and its random state alone."""
    before, about = tensors(model), trace(model)
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(model, method, head=None, **options)
    assert same(tensors(model), before)
    assert trace(model) == about


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("how", NORMALISED)
@pytest.mark.parametrize(("layer", "method"), ADDITIVE)
def test_a_weight_that_is_computed_in_every_forward_is_refused(layer, method, how):
    normalise, way_back = NORMALISED[how]
    built = LAYERS[layer][0]()
    name = "in_proj_weight" if layer == "attention" else "weight"
    normalise(built, name)
    model = randomise(Holder(built)).train()
    settings = OPTIONS.get(method, {})

    if method == "difffit":
        return  # It adapts the output projection of an attention, whose weight is a parameter.
    refused(
        model,
        method,
        f"The {name} of attn[a-z_.]* is no parameter .*call torch.nn.utils.{way_back} first",
        target="*",
        **settings,
    )


@pytest.mark.parametrize("method", ["ssf", "svdiff", "lora", "fact"])
def test_a_normalised_layer_may_be_excluded(method):
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Linear(6, 6)).train()
    before = tensors(model)
    medpeft.apply(model, method, head=None, target="*", exclude="0")
    assert not hasattr(model[0], "adapters")
    assert hasattr(model[1], "adapters")
    medpeft.remove(model)
    assert same(tensors(model), before)


@pytest.mark.parametrize("method", ["ssf", "svdiff", "repadapter"])
def test_a_bias_that_is_a_plain_attribute_is_refused(method):
    model = nn.Sequential(nn.Linear(6, 6))
    bias = model[0].bias.detach()
    del model[0].bias
    model[0].bias = bias
    refused(
        model,
        method,
        "The bias of 0 is no parameter or buffer .*: register it as one, or exclude",
        target="*",
    )


@pytest.mark.parametrize("how", ["pruned", "parametrized"])
@pytest.mark.parametrize("method", ["bias", "bitfit", "difffit"])
def test_the_original_of_a_pruned_or_parametrised_bias_trains_as_a_bias(method, how):
    model = nn.Sequential(Block(True)).double()
    layer = model[0].norm2
    if how == "pruned":
        prune.random_unstructured(layer, "bias", 0.5)
    else:
        parametrizations.weight_norm(layer, "bias", dim=None)
    medpeft.apply(model, method, head=None)

    trained = {name for name, p in layer.named_parameters() if p.requires_grad and "weight" not in name}
    assert trained == (
        {"bias_orig"}
        if how == "pruned"
        else {"parametrizations.bias.original0", "parametrizations.bias.original1"}
    )
    assert medpeft.check(model, torch.randn(2, 9, 8).double()).tensors > 0


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("method", ["ia3", "lora", "ssf", "svdiff", "vera"])
@pytest.mark.parametrize(
    ("layer", "sizes"), [(nn.Linear, (8, 0)), (nn.Linear, (0, 8)), (nn.Conv2d, (0, 4, 1))], ids=str
)
def test_a_layer_without_channels_is_refused(method, layer, sizes):
    model = nn.Sequential(layer(*sizes))
    refused(model, method, r"0 has no channels on one side, its weight is \(.*exclude it", target="*")


@pytest.mark.parametrize("form", ["child", "attribute", "method"])
@pytest.mark.parametrize("method", ["pfeiffer", "adapter_plus", "adaptformer", "vpt_deep", "vpt_shallow"])
def test_something_that_is_called_adapters_already_is_refused(method, form):
    model = nn.Sequential(Block(True))
    model[0].adapters = {
        "child": nn.ModuleDict({"mine": nn.Linear(8, 8)}),
        "attribute": None,
        "method": print,
    }[form]
    refused(model, method, "^0 has an attribute 'adapters' already, which medpeft needs .*: rename it")


@pytest.mark.parametrize("method", ["vera", "fact", "repadapter"])
def test_adapters_on_the_model_itself_are_refused_where_its_layers_share_modules(method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(True)
            self.adapters = nn.ModuleDict({"mine": nn.Linear(8, 8)})

        def forward(self, x):
            return self.adapters["mine"](self.block(x))

    refused(Model(), method, "^Model has an attribute 'adapters' already")
    model = medpeft.apply(Model(), "lora", head=None)
    assert isinstance(medpeft.remove(model).adapters, nn.ModuleDict)


COMPLEX = ("full", "bias", "bitfit", "ssf", "ia3")


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize(("layer", "method"), [case for case in ADDITIVE if case[0] in ("linear", "conv2d")])
def test_a_layer_of_complex_numbers_is_refused_by_methods_that_would_lose_a_part(layer, method):
    model = Holder(LAYERS[layer][0]()).to(torch.complex64)
    if method not in COMPLEX:
        message = f"attn has complex numbers, of which '{method}' would lose the imaginary part"
        refused(model, method, message, target="*", **OPTIONS.get(method, {}))


@pytest.mark.filterwarnings("ignore:merge created", "ignore:Complex modules are a new feature")
@pytest.mark.parametrize("method", COMPLEX)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_other_methods_adapt_save_load_and_merge_a_layer_of_complex_numbers(kind, method, bias, tmp_path):
    if not bias and method in ("bias", "bitfit"):
        return
    layer = nn.Linear(4, 6, bias) if kind == "linear" else nn.Conv2d(4, 6, 3, bias=bias)
    base = nn.Sequential(layer).to(torch.complex64)
    model, x = (
        copy.deepcopy(base),
        torch.randn(2, *((4,) if kind == "linear" else (4, 5, 5)), dtype=torch.complex64),
    )
    medpeft.apply(model, method, head=None, target="*")
    with torch.no_grad():
        assert torch.equal(model(x), base(x))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        y = model(x)

    medpeft.save(model, tmp_path / "a.safetensors")
    loaded = medpeft.load(base, tmp_path / "a.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
        assert medpeft.check(model, x).tensors > 0
        if method not in ("full", "bias", "bitfit"):
            torch.testing.assert_close(medpeft.merge(model)(x), y)
