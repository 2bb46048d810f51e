"""What is written in place has the gradients of the plain expression, first and second."""

import copy
import importlib

import pytest
import torch
from models import FAMILIES, example, make, output, randomise_adapters

import medpeft
from medpeft.adapters import bias_gradients as biases
from medpeft.adapters.kernels import SumToBias, add_low_rank, add_pointwise
from medpeft.adapters.scale_shift import Recovery, scale_shift
from medpeft.architecture.rows import Rows

# Every method whose adapters write into their layer's output, and one family of each kind of layer.
PAIRS = [
    ("vit", "lora", {}),
    ("vit", "lora", {"target": "linear", "parts": "qkvo"}),
    ("vit", "lora", {"freeze_a": True}),
    ("vit", "ssf", {}),
    ("vit", "adaptformer", {"dropout": 0.0}),
    ("resnet", "lora", {}),
    ("resnet", "ssf", {}),
    ("resnet", "tsa", {}),
    ("convnext", "ssf", {}),
    ("convnext", "tsa", {}),
    ("monai_unet3d", "lora", {}),
    ("monai_unet3d", "ssf", {}),
    ("monai_unet3d", "bias", {}),
]


def gradients(model, x):
    model.zero_grad()
    y = output(model.train(), x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "method", "options"), PAIRS)
def test_gradients_in_place_are_those_of_the_plain_expression(family, method, options, monkeypatch):
    model, x = make(family), example(family)
    randomise_adapters(medpeft.apply(model, method, head=FAMILIES[family].head, **options))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    y, written = gradients(model, x)

    for name in ("lora", "ssf", "tsa"):
        monkeypatch.setattr(importlib.import_module(f"medpeft.formulas.{name}"), "in_place", lambda y: False)
    monkeypatch.setattr("medpeft.formulas.lora.linear_with_low_rank", lambda *given: None)
    monkeypatch.setattr(biases, "eager", lambda y: False)
    expected, plain = gradients(model, x)

    assert (y - expected).abs().max() < 1e-10
    assert written.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (written[name] - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max()), name


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


PARTS = (Rows("q", 0, 2), Rows("v", 5, 3))
KERNELS = {
    "add_low_rank": (
        lambda y, x, a, b: add_low_rank(y.clone(), x, a, b, 0.7),
        [(2, 5, 4), (2, 5, 6), (3, 6), (4, 3)],
    ),
    "add_low_rank to parts": (
        lambda y, x, a, b: add_low_rank(y.clone(), x, a, b, 0.7, PARTS),
        [(2, 5, 9), (2, 5, 6), (6, 6), (5, 3)],
    ),
    "add_low_rank to one vector": (
        lambda y, x, a, b: add_low_rank(y.clone(), x, a, b, 0.7),
        [(4,), (6,), (3, 6), (4, 3)],
    ),
    "add_pointwise": (
        lambda y, h, b: add_pointwise(y.clone(), h, b, 0.7, -3),
        [(2, 4, 3, 3), (2, 2, 3, 3), (4, 2)],
    ),
    "add_pointwise to one image": (
        lambda y, h, b: add_pointwise(y.clone(), h, b, 0.7, -3),
        [(4, 3, 3), (2, 3, 3), (4, 2)],
    ),
    "scale_shift": (
        lambda y, s, b: scale_shift(y.clone(), s + 3, b, 1, Recovery(), 0),
        [(2, 4, 3), (4,), (4,)],
    ),
    "scale_shift of one vector": (
        lambda y, s, b: scale_shift(y.clone(), s + 3, b, -1, Recovery(), 0),
        [(4,), (4,), (4,)],
    ),
    "scale_shift near zero": (
        lambda y, s, b: scale_shift(y.clone(), s * 1e-3, b, -1, Recovery(), 0),
        [(2, 3, 4), (4,), (4,)],
    ),
    "SumToBias": (lambda y, b: SumToBias.apply(y.clone() + b.detach()[:, None], b, 1), [(2, 4, 3), (4,)]),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients_agree_with_finite_differences(kernel):
    function, shapes = KERNELS[kernel]
    torch.manual_seed(0)
    given = [_random(*shape) for shape in shapes]
    if kernel == "SumToBias":  # The bias is in the output already, cut off from autograd.
        y, bias = given
        grad = torch.autograd.grad(function(y, bias).square().sum(), bias)[0]
        assert torch.allclose(grad, torch.autograd.grad((y + bias[:, None]).square().sum(), bias)[0])
        return
    assert torch.autograd.gradcheck(function, given)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-4, 1e-6])
def test_ssf_keeps_what_it_could_not_find_again_under_its_shift(size):
    torch.manual_seed(0)
    model = medpeft.apply(torch.nn.Sequential(torch.nn.Linear(16, 16, bias=False)), "ssf", head=None)
    with torch.no_grad():
        model[0].weight.mul_(size)
        model[0].adapters.ssf.shift.fill_(1.0)
    exact, x = copy.deepcopy(model).double(), torch.randn(64, 16)
    weights = torch.randn(64, 16)

    (got,) = torch.autograd.grad((model(x) * weights).sum(), model[0].adapters.ssf.scale)
    (expected,) = torch.autograd.grad(
        (exact(x.double()) * weights.double()).sum(), exact[0].adapters.ssf.scale
    )

    assert (got - expected).norm() < 1e-5 * expected.norm()
    assert (type(model(x).grad_fn).__name__ == "ScaleShiftBackward") == (size >= 0.1)


@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-3, 1e30, torch.inf])
def test_ssf_has_the_gradient_of_any_scale(value):
    torch.manual_seed(0)
    model = medpeft.apply(torch.nn.Sequential(torch.nn.Linear(4, 4)), "ssf", head=None)
    x, scale = torch.randn(5, 4), model[0].adapters.ssf.scale
    with torch.no_grad(), medpeft.disabled(model):
        expected = model(x).sum(0)
    with torch.no_grad():
        scale[1] = value

    model(x).sum().backward()

    torch.testing.assert_close(scale.grad, expected)


def test_an_adapter_asks_now_and_then_whether_its_shift_has_grown_too_large():
    y, scale, shift = torch.full((4, 3), 1e-3), torch.ones(3), torch.zeros(3)
    recovery = Recovery()
    answers = []
    for version in range(48):
        if version == 5:
            shift.fill_(1.0)  # a thousand times y·γ
        if version == 20:
            shift.zero_()
        answers.append(recovery(y, scale, shift, -1, version))
    assert answers == [True] * 16 + [False] * 16 + [True] * 16
    shift.fill_(1.0)
    assert recovery(y, scale, shift, -1, 47)  # as it was in the forward that is computed again
    assert not recovery(y, scale, shift, -1, 0)  # another parameter
