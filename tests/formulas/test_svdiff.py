"""SV-Diff against its formula, written out in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from layer_oracles import applied, assert_computes, drawn
from torch import nn

import medpeft


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 7), (2, 5)),
        (nn.Linear(7, 5, bias=False), (2, 3, 7)),
        (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
        (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3)),
        (nn.LayerNorm(5), (2, 5)),
    ],
    ids=str,
)
def test_svdiff_shifts_the_singular_values(layer, shape, scale):
    x, layer = drawn(*shape), copy.deepcopy(layer)
    model, _, values = applied(layer, "svdiff", scale=scale, norms=True)
    weight = layer.weight.detach().numpy()
    matrix = weight.reshape(len(weight), -1) if weight.ndim > 1 else weight[None]
    left, sigma, right = np.linalg.svd(matrix, full_matrices=False)
    shifted = (left * np.maximum(sigma + scale * values["delta"], 0)) @ right

    with medpeft.merged(model):
        merged = layer.weight.detach().numpy().copy()
    assert values["delta"].shape == sigma.shape
    assert np.abs(merged - shifted.reshape(weight.shape)).max() <= 1e-12 * np.abs(weight).max()
    plain = medpeft.remove(copy.deepcopy(model))
    with torch.no_grad():
        plain[0].weight.copy_(torch.from_numpy(shifted.reshape(weight.shape)))
        assert_computes(model, x, plain(x).numpy())


def test_svdiff_cuts_singular_values_off_at_zero():
    linear = nn.Linear(3, 3, bias=False)
    model, adapter, _ = applied(linear, "svdiff")
    with torch.no_grad():
        adapter.delta.fill_(-1e6)

    assert model(drawn(2, 3)).abs().max() < 1e-14
