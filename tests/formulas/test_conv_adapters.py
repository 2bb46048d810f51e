"""Conv-Adapter and residual adapters beside and after convolutions against their formulas in NumPy and float64."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from by_hand import gelu, numbers, relu
from conv_adapter_oracles import adapted_block, bottleneck
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


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("form", ["parallel", "sequential"])
def test_conv_adapter_in_a_bottleneck_is_added_behind_its_norm_and_activation(library, form):
    if library == "timm":
        model = timm.create_model("resnet26", layers=(1, 1, 1, 1), channels=(4, 8, 8, 8), num_classes=2)
    else:
        model = torchvision.models.ResNet(
            torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8, num_classes=2
        )
    inputs = model.layer2[0].conv1.in_channels
    block, plain, p = adapted_block(model, "layer2.0", form=form, target="layer2.0.conv2")
    x = drawn(2, inputs, 8, 8)

    with torch.no_grad():
        entered = plain.bn1(plain.conv1(x)).relu()
        y = plain.bn2(plain.conv2(entered)).relu()
        source, stride = (entered, 2) if form == "parallel" else (y, 1)
        y = y + bottleneck(p, source.numpy(), relu, stride)
        expected = (plain.bn3(plain.conv3(y)) + plain.downsample(x)).relu()

    assert_computes(block, x, expected.numpy())


def test_conv_adapter_goes_by_the_first_call_of_an_activation_that_a_block_calls_twice():
    model = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=2, norm_layer=nn.BatchNorm2d
    )
    medpeft.apply(randomise(model.double().eval()), "conv_adapter")
    block, plain = model.layer1[0], copy.deepcopy(medpeft.remove(copy.deepcopy(model)).layer1[0])
    randomise_adapters(model, size=0.3)
    first, second = (numbers(conv.adapters["conv_adapter"]) for conv in (block.conv1, block.conv2))
    x = drawn(2, 64, 6, 6)

    with torch.no_grad():
        hidden = plain.bn1(plain.conv1(x)).relu() + bottleneck(first, x.numpy(), relu)
        branch = plain.bn2(plain.conv2(hidden)) + bottleneck(second, hidden.numpy(), relu)

    assert_computes(block, x, (branch + x).relu().numpy())


def test_conv_adapter_is_around_an_inverted_residual_block_with_its_activation():
    model = timm.models.efficientnet._gen_efficientnet("efficientnet_b0", 0.25, 0.1, num_classes=2)
    block, plain, p = adapted_block(model, "blocks.1.0", target="blocks.1.0")
    x = drawn(2, block.conv_pw.in_channels, 7, 7)

    with torch.no_grad():
        expected = plain(x) + bottleneck(p, x.numpy(), silu, stride=2, padding=0)

    assert p["down"].shape[2:] == (1, 1)
    assert_computes(block, x, expected.numpy())


def silu(x):
    return x / (1 + np.exp(-x))


def test_conv_adapter_beside_a_depthwise_convolution_of_convnext_has_its_gelu():
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=2)
    block, plain, p = adapted_block(model, "stages.0.blocks.0", target="stages.0.blocks.0.conv_dw")
    x = drawn(2, 4, 6, 6)

    with torch.no_grad():
        y = plain.conv_dw(x) + bottleneck(p, x.numpy(), gelu, padding=3)
        expected = x + plain.mlp(plain.norm(y)) * plain.gamma[:, None, None]

    assert_computes(block, x, expected.numpy())


def test_conv_adapter_takes_the_convolutions_between_the_stages_of_convnext_too():
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=2)

    between = {f"stages.{i}.downsample.1" for i in (1, 2, 3)}
    sites = {site.name for _, site in medpeft.plan(model, "conv_adapter").sites}
    within = {site.name for _, site in medpeft.plan(model, "conv_adapter", place="convolution").sites}

    assert sites - within == between
    assert within == {f"stages.{i}.blocks.0.conv_dw" for i in range(4)}


def test_conv_adapter_is_not_shut_off_by_the_norm_of_its_convolution():
    model = randomise(make("resnet"))
    with torch.no_grad():
        model.layer1[0].bn2.weight.zero_()
    randomise_adapters(medpeft.apply(model, "conv_adapter"))
    block, x = model.layer1[0], drawn(1, model.layer1[0].conv1.in_channels, 6, 6)

    with torch.no_grad():
        y = block(x)
        with medpeft.disabled(model):
            assert (y - block(x)).abs().max() > 1e-6


def test_conv_adapter_says_so_where_nothing_after_the_convolution_is_called():
    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1, self.act1 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
            self.conv2 = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv2(self.conv1(x))

    model = nn.Sequential(Bottleneck(), nn.Conv2d(4, 2, 1))
    medpeft.apply(model, "conv_adapter", head="1")

    with pytest.raises(medpeft.MedpeftError, match=r"found nothing after 0\.conv1 to add to: use place="):
        model(torch.zeros(1, 4, 8, 8))


@pytest.mark.parametrize("option", ["place", "activation"])
def test_conv_adapter_refuses_a_place_and_an_activation_that_it_does_not_know(option):
    with pytest.raises(medpeft.MedpeftError, match=f"{option}='gelu'"):
        medpeft.plan(make("resnet"), "conv_adapter", **{option: "gelu"}).table()


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


@pytest.mark.parametrize(("mode", "kernel"), [("reflect", 3), ("circular", 5)])
def test_an_output_that_is_too_small_to_be_padded_with_its_own_values_is_refused(mode, kernel):
    conv = nn.Conv2d(2, 2, kernel, padding_mode=mode)
    model = medpeft.apply(nn.Sequential(conv), "conv_adapter", target="*", head=None, form="sequential")
    assert model(torch.ones(1, 2, kernel + 1, kernel + 1)).shape == (1, 2, 2, 2)

    with pytest.raises(
        medpeft.MedpeftError,
        match=rf"\(1, 2, 1, 1\) is too small to be padded by {kernel // 2} with padding_mode='{mode}'",
    ):
        model(torch.ones(1, 2, kernel, kernel))
