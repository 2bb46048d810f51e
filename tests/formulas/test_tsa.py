"""TSA against its formula, written out in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from layer_oracles import GEOMETRIES, applied, assert_computes, base_convolution, convolved, drawn
from torch import nn

import medpeft


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tsa_is_a_1x1_convolution_beside_the_layer(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, values = applied(conv, "tsa")

    beside = convolved(x.numpy(), values["alpha"][..., None, None], conv.stride[0], groups=conv.groups)
    assert_computes(model, x, base_convolution(conv, x) + beside)


def test_tsa_of_a_grouped_layer_may_mix_all_channels():
    conv, x = nn.Conv2d(4, 8, 3, padding=1, stride=2, groups=2), drawn(2, 4, 7, 9)
    model, _, values = applied(conv, "tsa", dense=True)

    assert values["alpha"].shape == (8, 4)
    beside = np.einsum("oi,nihw->nohw", values["alpha"], x.numpy()[:, :, ::2, ::2])
    assert_computes(model, x, base_convolution(conv, x) + beside)
    with pytest.raises(
        medpeft.MedpeftError, match="a dense α does not fit into a grouped convolution's weight"
    ):
        medpeft.merge(model)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2}, {"groups": 4}, {"groups": 2, "stride": 2}])
def test_tsa_as_a_vector_adds_each_channel_to_itself(geometry):
    conv, x = nn.Conv2d(4, 4, 3, padding=1, **geometry), drawn(2, 4, 7, 9)
    model, _, values = applied(conv, "tsa", form="vector")

    seen = x.numpy()[:, :, :: conv.stride[0], :: conv.stride[0]]
    assert_computes(model, x, base_convolution(conv, x) + values["alpha"][:, None, None] * seen)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_tsa_in_series_follows_the_layer(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, values = applied(conv, "tsa", form="series")

    y = base_convolution(conv, x)
    mixed = np.einsum("oi,nihw->nohw", values["alpha"], y)
    assert_computes(model, x, y + mixed + values["bias"][:, None, None])


@pytest.mark.parametrize("form", ["matrix", "vector"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_tsa_starts_at_the_official_ten_thousandth_of_the_identity(form, groups):
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups)
    model = medpeft.apply(nn.Sequential(conv).double(), "tsa", head=None, target="*", form=form, init="eye")
    plain, x = copy.deepcopy(model), drawn(1, 4, 5, 5)

    with torch.no_grad():
        change = model(x) - medpeft.remove(plain)(x)
    torch.testing.assert_close(change, 1e-4 * x, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(("form", "size"), [("matrix", 3), ("vector", 3), ("matrix", 5)])
def test_an_image_of_which_a_1x1_convolution_makes_another_size_is_refused(form, size):
    model = nn.Sequential(nn.Conv2d(4, 4, 2, stride=2))
    medpeft.apply(model, "tsa", head=None, target="*", form=form)

    assert model(torch.ones(1, 4, 4, 4)).shape == (1, 4, 2, 2)
    # Added all the same, an output of one pixel would grow to several.
    with pytest.raises(
        medpeft.MedpeftError, match=r"'tsa' adds a 1×1 convolution to 0, which makes \(1, 4, \d, \d\) of"
    ):
        model(torch.ones(1, 4, size, size))
