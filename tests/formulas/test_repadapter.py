"""RepAdapter against its formula, written out in NumPy and float64."""

import numpy as np
import pytest
from block_oracles import LAYERS, WIDTH, alone, assert_same, input_for, output_of, weights
from models import make, randomise_adapters

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
