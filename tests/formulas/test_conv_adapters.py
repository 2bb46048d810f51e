"""Conv-Adapter and residual adapters beside and after convolutions against their formulas in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from by_hand import numbers, relu
from layer_oracles import GEOMETRIES, assert_computes, base_convolution, convolved, drawn
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft


def applied_at(layer, method, **options):
    """As `applied`, for a method whose sites would be the residual blocks'."""
    model = nn.Sequential(layer).double().eval()
    randomise(model)
    medpeft.apply(model, method, head=None, target="*", **options)
    randomise_adapters(model, size=0.3)
    (adapter,) = layer.adapters.children()
    return model, adapter, numbers(adapter)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_adapter_beside_a_convolution(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "conv_adapter", reduction=2)

    slides = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0]}
    hidden = relu(convolved(x.numpy(), p["down"], groups=2, **slides))
    change = p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden)
    assert p["down"].shape == (2, 2, *conv.kernel_size)
    assert_computes(model, x, base_convolution(conv, x) + change)


def test_conv_adapter_after_a_convolution():
    conv, x = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "conv_adapter", reduction=4, form="sequential")

    y = base_convolution(conv, x)
    hidden = relu(convolved(y, p["down"], padding=1, groups=2))
    assert p["down"].shape == (2, 4, 3, 3)
    assert_computes(model, x, y + p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden))


@pytest.mark.parametrize("size", [7, 8])
def test_conv_adapter_pads_by_the_size_of_its_input_as_its_host_does(size):
    from timm.layers import Conv2dSame

    conv, x = Conv2dSame(4, 4, 3, stride=2), drawn(2, 4, size, size)
    model, _, p = applied_at(conv, "conv_adapter", reduction=1)
    twin = Conv2dSame(4, 4, 3, stride=2, groups=4, bias=False).double()

    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(p["down"]))
        hidden = twin(x).relu().numpy()
        y = medpeft.remove(copy.deepcopy(model))(x).numpy()
    assert_computes(model, x, y + p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_residual_adapter_in_parallel_is_a_1x1_convolution_of_the_input(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "residual_adapter")

    beside = convolved(x.numpy(), p["alpha"][..., None, None], conv.stride[0], groups=conv.groups)
    assert_computes(model, x, base_convolution(conv, x) + beside)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_residual_adapter_in_series_is_a_1x1_convolution_of_the_output(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "residual_adapter", form="series")

    y = base_convolution(conv, x)
    assert_computes(model, x, y + np.einsum("oi,nihw->nohw", p["alpha"], y))


def test_by_themselves_residual_adapters_take_the_3x3_convolutions_of_the_residual_blocks():
    model = medpeft.apply(make("resnet"), "residual_adapter")

    adapted = [name for name, module in model.named_modules() if "adapters" in module._modules]
    assert adapted == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]
