"""An adapter computes the same in each of its forms, and switches only where they are the same."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import medpeft
from medpeft.adapters.record import adapted_layers

LAYERS = {
    "linear": (lambda: nn.Linear(12, 20), (2, 30, 12)),
    "linear without bias": (lambda: nn.Linear(20, 12, bias=False), (40, 20)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1, padding_mode="reflect"), (3, 6, 12, 12)),
    "conv3d": (lambda: nn.Conv3d(3, 4, 3, dilation=2), (2, 3, 8, 8, 8)),
}


def adapted(kind, method="svdiff", **options):
    build, shape = LAYERS[kind]
    torch.manual_seed(0)
    model = nn.Sequential(build().double(), nn.Flatten(), nn.LazyLinear(3, dtype=torch.float64))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model(x)
    medpeft.apply(model, method, target="0", head=None, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.add_(0.1 * torch.randn_like(p))
    return model, x


FACES = {"weight": "merged", "output": "forward", "compute": "compute"}


def form(model, x):
    """How each adapter of the adapted layer acts on `x`, by the faces that its forward calls, in order."""
    acted = []

    def noted(form, face):
        def call(*args):
            acted.append(form)
            return face(*args)

        return call

    _, layer, adapters = next(iter(adapted_layers(model)))
    with contextlib.ExitStack() as stack:
        for _, adapter in adapters.adapters():
            for form, name in FACES.items():
                if hasattr(adapter, name):
                    face = noted(form, getattr(adapter, name))
                    stack.enter_context(mock.patch.object(adapter, name, face))
        layer(x)
    return acted


def gradients(y, *inputs):
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), inputs)


@pytest.mark.parametrize("kind", LAYERS)
def test_factors_give_the_output_and_gradients_of_the_written_out_formula(kind):
    model, x = adapted(kind)
    layer = model[0]
    adapter = layer.adapters["svdiff"]
    assert form(model, x) == ["compute"]

    y = layer(x)

    spectrum = (adapter.values + adapter.delta).relu()
    weight = ((adapter.left * spectrum) @ adapter.right).view(layer.weight.shape)
    assert weight.shape == layer._parameters["weight"].shape
    if isinstance(layer, nn.Linear):
        expected = F.linear(x, weight, layer.bias)
    else:
        pad = list(layer._reversed_padding_repeated_twice)
        padded = F.pad(x, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        conv = F.conv2d if x.ndim == 4 else F.conv3d
        expected = conv(padded, weight, layer.bias, layer.stride, 0, layer.dilation)
    assert (y - expected).abs().max() < 1e-10
    for own, plain in zip(gradients(y, x, adapter.delta), gradients(expected, x, adapter.delta), strict=True):
        assert (own - plain).abs().max() < 1e-10 * plain.abs().max().clamp(min=1)


def test_factors_keep_less_for_backward_than_a_weight_built_of_them():
    model, x = adapted("linear")

    def kept(y):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.setdefault(t.data_ptr(), t), lambda t: t
        ):
            y()
        own = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
        return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)

    half = x[..., :12].numel() * 8
    assert kept(lambda: model[0](x)) <= half + 2 * 12 * 8


def test_a_weight_that_was_loaded_after_apply_is_not_taken_for_its_old_factors():
    model, x = adapted("linear")
    assert form(model, x) == ["compute"]

    with torch.no_grad():
        model[0].weight.add_(torch.randn(20, 12, dtype=torch.float64))

    assert form(model, x) == ["weight"]
    trained = model(x)
    with torch.no_grad():
        assert (model(x) - trained).abs().max() < 1e-12


def test_a_weight_that_trains_gets_its_gradient():
    model, x = adapted("linear")
    model[0].weight.requires_grad_(True)
    assert form(model, x) == ["weight"]
    model(x).sum().backward()
    assert model[0].weight.grad.abs().max() > 0


def test_another_adapter_on_the_weight_rules_factors_out():
    model, x = adapted("linear", "svdiff+lora", rank=2, dora=True)
    assert form(model, x) == ["weight", "weight"]
    with torch.no_grad():
        expected = model(x)
    assert (model(x) - expected).abs().max() < 1e-12


class RowNorms(medpeft.Adapter):
    """The rows of a weight, each of a norm that is learned."""

    def __init__(self, site):
        super().__init__(site)
        self.norms = nn.Parameter(site.host.norm(dim=1, keepdim=True))

    @classmethod
    def sites(cls, network, *, targeted=False):
        yield from network.sites("linear")

    def merged(self, weight, bias):
        return weight * self.norms / weight.norm(dim=1, keepdim=True), bias


@pytest.mark.parametrize(
    ("method", "forms"),
    [("svdiff+row_norms", ["weight", "weight"]), ("svdiff+lora", ["weight", "output"])],
)
def test_a_later_adapter_sees_the_changed_weight_in_training_in_inference_and_merged(
    method, forms, own_registry
):
    medpeft.register("row_norms")(RowNorms)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 600).double())
    options = {"rank": 2, "dora": True} if "lora" in method else {}
    medpeft.apply(model, method, target="0", head=None, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".adapters." in name:
                p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(3, 600, dtype=torch.float64)
    trained = model(x)
    with torch.no_grad():
        assert form(model, x) == forms
        assert (model(x) - trained).abs().max() < 1e-10
        with medpeft.merged(model):
            assert (model(x) - trained).abs().max() < 1e-10


def test_an_adapter_on_the_output_follows_the_factors():
    model, x = adapted("linear", "svdiff+ssf")
    assert form(model, x) == ["compute", "output"]
    with torch.no_grad():
        expected = model(x)
    assert (model(x) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("rows", [1, 400])
def test_an_input_given_by_keyword_is_adapted_once(rows):
    model, _ = adapted("linear")
    x = torch.randn(rows, 12, dtype=torch.float64)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert (model[0](input=x) - model[0](x)).abs().max() == 0


def test_copies_and_moves_keep_the_factors():
    import copy

    model, x = adapted("linear")
    twin = copy.deepcopy(model)
    assert form(twin, x) == ["compute"]
    assert torch.equal(twin(x), model(x))


def test_an_input_that_its_maker_needs_again_is_no_obstacle():
    model, x = adapted("conv")
    assert form(model, torch.relu(x)) == ["compute"]
    assert form(model, torch.sigmoid(x)) == ["compute"]
