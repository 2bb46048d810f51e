"""OFT against its formula, written out in NumPy and float64."""

import numpy as np
import pytest
from block_oracles import LAYERS, alone, assert_same, input_for, output_of, weights
from torch import nn

import medpeft


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_oft_rotates_the_weights_of_every_neuron(layer):
    model, values = alone(layer, "oft", block_size=4)
    x, width = input_for(layer), weights(model[0])[0].shape[1]
    rotation = np.zeros((width, width))
    for i, entries in enumerate(values["skew"]):
        q = np.zeros((4, 4))
        q[np.triu_indices(4, 1)] = entries
        q -= q.T
        rotation[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = (np.eye(4) + q) @ np.linalg.inv(np.eye(4) - q)

    assert_same(rotation @ rotation.T, np.eye(width))
    weight, bias = weights(model[0])
    rotated = (weight.reshape(-1, width) @ rotation).reshape(weight.shape)
    assert_same(model(x), output_of(layer, x.numpy(), rotated, bias))


def test_oft_takes_the_largest_block_that_divides_the_inputs_or_says_why_not():
    model = medpeft.apply(nn.Sequential(nn.Linear(20, 3)), "oft", head=None, target="*", block_size=8)
    assert model[0].adapters.oft.skew.shape == (4, 10)
    with pytest.raises(medpeft.MedpeftError, match="0 has 7 inputs, which no block_size up to 4 divides"):
        medpeft.apply(nn.Sequential(nn.Linear(7, 3)), "oft", head=None, target="*", block_size=4)
