"""What is written in place has the gradients of the plain expression, and refuses what it cannot do."""

import importlib

import pytest
import torch
from models import FAMILIES, example, make, output, randomise_adapters

import medpeft
from medpeft.adapters import bias_gradients as biases
from medpeft.adapters.kernels import AddLowRank, AddPointwise, ScaleShift, SumToBias

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
    monkeypatch.setattr(biases, "eager", lambda y: False)
    expected, plain = gradients(model, x)

    assert (y - expected).abs().max() < 1e-10
    assert written.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (written[name] - gradient).abs().max() <= 1e-10 * max(1.0, gradient.abs().max()), name


def _random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


KERNELS = {
    "AddLowRank": (
        lambda y, x, a, b: AddLowRank.apply(y.clone(), x, a, b, 0.7, 2),
        [(2, 5, 9), (2, 5, 6), (3, 6), (4, 3)],
    ),
    "AddPointwise": (
        lambda y, h, b: AddPointwise.apply(y.clone(), h, b, 0.7),
        [(2, 4, 3, 3), (2, 2, 3, 3), (4, 2)],
    ),
    "ScaleShift": (lambda y, s, b: ScaleShift.apply(y.clone(), s + 3, b, 1), [(2, 4, 3), (4,), (4,)]),
    "ScaleShift near zero": (
        lambda y, s, b: ScaleShift.apply(y.clone(), s * 1e-3, b, -1),
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


@pytest.mark.parametrize("kernel", ["AddLowRank", "AddPointwise", "ScaleShift"])
def test_a_second_derivative_is_refused_by_name_rather_than_wrong(kernel):
    function, shapes = KERNELS[kernel]
    given = [_random(*shape) for shape in shapes]
    (first,) = torch.autograd.grad(function(*given).square().sum(), given[-1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
