"""A bias that trains while its convolution's weight is frozen gets the right gradient, without the cost of the weight's."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import medpeft

LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 8)),
    "transposed 3-d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3, 3, 3)),
}


def build(kind):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]
    return nn.Sequential(layer().double(), nn.Tanh()), torch.randn(
        shape, dtype=torch.float64, requires_grad=True
    )


def step(model, x):
    y = model(x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y


@pytest.mark.parametrize("kind", LAYERS)
def test_output_and_gradients_are_those_of_torch_to_the_last_bit_of_the_output(kind):
    model, x = build(kind)
    plain, also = copy.deepcopy(model), x.detach().clone().requires_grad_()
    plain[0].weight.requires_grad_(False)
    medpeft.apply(model, "bias", head=None)

    assert torch.equal(step(model, x), step(plain, also))
    assert (model[0].bias.grad - plain[0].bias.grad).abs().max() < 1e-10
    assert (x.grad - also.grad).abs().max() < 1e-10
    assert model[0].weight.grad is None


def test_the_weight_s_gradient_is_not_computed():
    def flops(model, x):
        with FlopCounterMode(display=False) as counter:
            step(model, x)
        return counter.get_total_flops()

    model, x = build("conv")
    # After an activation that keeps its output for its own backward.
    model.insert(0, nn.ReLU())
    floor = flops(model.requires_grad_(False), x)
    assert flops(medpeft.apply(model, "bias", head=None), x) == floor


def test_a_weight_that_is_thawed_later_trains_too():
    model, x = build("conv")
    medpeft.apply(model, "bias", head=None)
    model[0].weight.requires_grad_(True)
    step(model, x)
    assert model[0].weight.grad.abs().max() > 0
    assert model[0].bias.grad.abs().max() > 0


def test_gradients_of_gradients_and_of_a_batch_of_samples():
    model, x = build("conv")
    medpeft.apply(model, "bias", head=None)
    bias = model[0].bias
    (first,) = torch.autograd.grad(model(x).square().sum(), bias, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), bias)

    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(given, sample):
        return torch.func.functional_call(model, given, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x.detach())
    assert second.abs().max() > 0
    assert (each["0.bias"].sum(0) - first).abs().max() < 1e-10


def test_an_error_inside_leaves_the_bias_in_its_place():
    model, _ = build("conv")
    medpeft.apply(model, "bias", head=None)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8, 8, dtype=torch.float64))
    assert model[0].bias is dict(model.named_parameters())["0.bias"]
    assert medpeft.remove(model)[0]._forward_hooks == {}
