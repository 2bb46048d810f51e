"""RepAdapter against its formula, written out in NumPy and float64."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
from block_oracles import LAYERS, WIDTH, alone, assert_same, drawn, input_for, output_of, weights
from models import make, randomise, randomise_adapters

import medpeft


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("groups", [1, 2])
def test_repadapter_is_two_linear_maps_before_the_layer(layer, groups):
    model, values = alone(layer, "repadapter", bottleneck=4, groups=groups, scale=0.5)
    x = input_for(layer)
    up = np.zeros((x.shape[1], 4))
    for g, part in enumerate(values["up"]):
        up[g * len(part) : (g + 1) * len(part), g * part.shape[1] : (g + 1) * part.shape[1]] = part

    channels = x.numpy() if x.ndim == 2 else np.moveaxis(x.numpy(), 1, -1)
    hidden = channels @ values["down"].T + values["down_bias"]
    entered = channels + 0.5 * (hidden @ up.T + values["up_bias"])
    entered = entered if x.ndim == 2 else np.moveaxis(entered, -1, 1)
    assert_same(model(x), output_of(layer, entered, *weights(model[0])))


def test_repadapter_shares_the_maps_before_queries_keys_and_values():
    model = randomise_adapters(medpeft.apply(make("hf_vit"), "repadapter"))
    attention = model.vit.layers[0].attention

    maps = {
        id(layer.adapters.repadapter.maps) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(maps) == 1
    assert maps != {id(model.vit.layers[1].attention.q_proj.adapters.repadapter.maps)}
    branches = len(model.vit.layers) * 2
    report = medpeft.report(model)
    assert report.trainable - report.head == branches * (WIDTH * 8 + 8 + WIDTH * 4 + WIDTH)


def test_repadapter_refuses_dropout_where_only_the_weight_can_act():
    medpeft.apply(make("vit"), "repadapter", dropout=0.1)
    with pytest.raises(
        medpeft.MedpeftError,
        match=r"dropout=0.1 cannot act at blocks.0.attn.qkv, whose weight blocks.0.attn reads",
    ):
        medpeft.apply(make("beit"), "repadapter", dropout=0.1)


def convnext(library):
    """A tiny ConvNeXt with random weights, and the names of a block's depthwise convolution and of its MLP."""
    if library == "timm":
        model = timm.create_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), num_classes=2)
        return randomise(model.double().eval()), "stages.0.blocks.0", ("conv_dw", "mlp.fc1")
    setting = torchvision.models.convnext.CNBlockConfig(4, None, 2)
    model = torchvision.models.ConvNeXt([setting], num_classes=2)
    return randomise(model.double().eval()), "features.1.0", ("block.0", "block.3")


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_repadapter_in_convnext_stands_before_the_depthwise_convolution_and_the_mlp(library):
    model, name, places = convnext(library)
    plain = copy.deepcopy(model.get_submodule(name))
    medpeft.apply(model, "repadapter", bottleneck=4, scale=0.5)
    randomise_adapters(model, size=0.3)
    block = model.get_submodule(name)
    x = drawn(2, 4, 6, 6)

    mapped = []
    for place in places:
        maps = block.get_submodule(place).adapters.repadapter.maps
        up = torch.block_diag(*maps.up)
        matrix = torch.eye(4, dtype=torch.float64) + 0.5 * up @ maps.down
        mapped.append((matrix, 0.5 * (up @ maps.down_bias + maps.up_bias)))
    for place, (matrix, shift) in zip(places, mapped, strict=True):
        axis = 1 if place == places[0] else -1
        plain.get_submodule(place).register_forward_pre_hook(
            lambda layer, args, a=axis, m=matrix, s=shift: (args[0].movedim(a, -1) @ m.T + s).movedim(-1, a)
        )

    with torch.no_grad():
        assert_same(block(x), plain(x).numpy())


def test_repadapter_before_a_depthwise_convolution_does_not_merge_and_the_rest_does():
    model, _, _ = convnext("timm")
    medpeft.apply(model, "repadapter", bottleneck=4)
    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.0\.conv_dw: .*a depthwise convolution keeps apart"
    ):
        medpeft.merge(model)

    medpeft.remove(model)
    randomise_adapters(medpeft.apply(model, "repadapter", bottleneck=4, exclude="*.conv_dw"), size=0.3)
    x = drawn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(medpeft.merge(model)(x), expected, rtol=1e-10, atol=1e-10)
