"""A linear layer and its low-rank change in one step compute what the two steps compute."""

import copy
import pickle

import pytest
import torch
from models import randomise_adapters
from torch import nn

import medpeft
from medpeft.adapters.linear_low_rank import linear_with_low_rank
from medpeft.architecture.rows import Rows, evenly_spaced

EVEN = (Rows("q", 0, 4), Rows("v", 8, 4))
PARTS = {
    "whole": (),
    "even parts": EVEN,
    "odd parts": (Rows("q", 0, 2), Rows("v", 5, 3)),
}


def given(parts, shape, *, bias=True):
    """A layer of 12 outputs, an input of 6 channels, and A and B of rank 3."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 12, bias=bias).double()
    layer.weight.requires_grad_(False)
    channels = sum(part.size for part in parts) or 12
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    down = torch.randn(3 * max(1, len(parts)), 6, dtype=torch.float64, requires_grad=True)
    up = torch.randn(channels, 3, dtype=torch.float64, requires_grad=True)
    return layer, x, down, up


def written_out(layer, x, down, up, parts):
    """The formula, part by part."""
    y = nn.functional.linear(x, layer.weight, layer.bias)
    if not parts:
        return y + 0.7 * (x @ down.T) @ up.T
    first = 0
    for number, part in enumerate(parts):
        change = 0.7 * (x @ down[3 * number : 3 * number + 3].T) @ up[first : first + part.size].T
        y = y + nn.functional.pad(change, (part.start, 12 - part.start - part.size))
        first += part.size
    return y


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 5), (7,), (), (0, 5)])
@pytest.mark.parametrize("parts", PARTS)
def test_output_and_gradients_are_those_of_the_formula(parts, shape, bias):
    layer, x, down, up = given(PARTS[parts], shape, bias=bias)
    asked = [x, down, up, *([layer.bias] if bias else [])]

    def joined():
        return linear_with_low_rank(layer, x, down, up, 0.7, PARTS[parts], evenly_spaced(PARTS[parts]))

    found, expected = joined(), written_out(layer, x, down, up, PARTS[parts])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(joined(), expected)
    weights = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), asked),
        torch.autograd.grad((expected * weights).sum(), asked),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("parts", PARTS)
def test_second_derivatives_agree_with_finite_differences(parts):
    layer, *tensors = given(PARTS[parts], (2, 2))

    def function(x, down, up):
        return linear_with_low_rank(layer, x, down, up, 0.7, PARTS[parts])

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("frozen", ["x", "down", "up"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen):
    layer, x, down, up = given((), (4,))
    tensors = {"x": x, "down": down, "up": up}
    tensors[frozen].requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear_with_low_rank(layer, x, down, up, 0.7)
    y.sum().backward()
    assert tensors[frozen].grad is None
    assert all(tensor.grad is not None for name, tensor in tensors.items() if name != frozen)
    assert any(tensor is x for tensor in kept) == (frozen != "down")


class Tagged(torch.Tensor):
    """A tensor of somebody else's, which may compute otherwise."""


def lora(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return randomise_adapters(medpeft.apply(model, "lora", target="0", head="2", **options))


def steps_of(model, x):
    """How the first layer computes: in one step, or in two."""
    name = type(model[0](x).grad_fn).__name__
    return {"LowRankLinearBackward": "one", "AddLowRankBackward": "two"}.get(name, "plain")


def test_it_is_one_step_wherever_that_is_known_to_be_right():
    model, x = lora(), torch.randn(4, 6)
    assert steps_of(model, x) == "one"
    assert steps_of(lora(dropout=0.5).eval(), x) == "one"
    assert steps_of(lora(dropout=0.5).train(), x) == "two"
    assert steps_of(lora(bias=True), x) == "plain"
    assert steps_of(lora().half(), x.half()) == "plain"
    with medpeft.scaled(model, 0.5):
        assert steps_of(model, x) != "one"
    with torch.autocast("cpu", torch.bfloat16):
        assert steps_of(model, x) == "plain"
    assert steps_of(model, x.as_subclass(Tagged)) != "one"
    model[0].weight.requires_grad_(True)
    assert steps_of(model, x) != "one"


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_hook_on_the_adapter_is_called(hook):
    model, x, called = lora(), torch.randn(4, 6), []
    expected = model(x)
    handle = getattr(model[0].adapters.lora, f"register_{hook}_hook")(lambda *given: called.append(hook))
    torch.testing.assert_close(model(x), expected)
    model(x.requires_grad_()).sum().backward()
    assert called
    handle.remove()
    assert steps_of(model, x) == "one"


def test_another_forward_of_the_adapter_is_called():
    model, x = lora(), torch.randn(4, 6)
    model[0].adapters.lora.forward = lambda x, y: y + 1
    with torch.no_grad():
        assert torch.equal(model[0](x), nn.functional.linear(x, model[0].weight, model[0].bias) + 1)


def test_a_copy_that_was_pickled_before_there_was_one_step_computes_the_same():
    model, x = lora(), torch.randn(4, 6)
    older = copy.deepcopy(model)
    del older[0].adapters.__dict__["order"]
    del older[0].adapters.lora.__dict__["joins"]
    older = pickle.loads(pickle.dumps(older))
    assert steps_of(older, x) == "two"
    assert torch.equal(older(x), model(x))
