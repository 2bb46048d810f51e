"""Every additive method against its formula, written out in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft


def applied(layer, method, dtype=torch.float64, **options):
    """The layer alone as a model, adapted, with random weights and adapters: (layer, adapter as numpy arrays)."""
    model = nn.Sequential(layer).to(dtype).eval()
    randomise(model)
    medpeft.apply(model, method, head=None, **({"target": "*"} if method in ("tsa", "lora") else {}), **options)
    randomise_adapters(model, size=0.3)
    (adapter,) = (m for m in layer.adapters.children())
    values = {name: p.detach().numpy() for name, p in adapter.named_parameters()}
    return model, adapter, values


def numbers(layer):
    return (
        layer.weight.detach().numpy(),
        0.0 if layer.bias is None else layer.bias.detach().numpy(),
    )


def drawn(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_computes(model, x, expected):
    with torch.no_grad():
        got = model(x).numpy()
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def convolved(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """A 2-d convolution as a loop over groups and taps."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    outputs, inputs, k, _ = weight.shape
    height, width = ((size - dilation * (k - 1) - 1) // stride + 1 for size in x.shape[2:])
    y = np.zeros((len(x), outputs, height, width))
    for g in range(groups):
        rows = slice(g * outputs // groups, (g + 1) * outputs // groups)
        part = x[:, g * inputs : (g + 1) * inputs]
        for i in range(k):
            for j in range(k):
                rows_seen = slice(i * dilation, i * dilation + stride * (height - 1) + 1, stride)
                cols_seen = slice(j * dilation, j * dilation + stride * (width - 1) + 1, stride)
                y[:, rows] += np.einsum("oi,nihw->nohw", weight[rows, :, i, j], part[:, :, rows_seen, cols_seen])
    return y


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2},
    {"kernel_size": 5, "padding": 2, "groups": 4, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 2},
]


def base_convolution(conv, x):
    weight, bias = numbers(conv)
    geometry = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0], "groups": conv.groups}
    return convolved(x.numpy(), weight, **geometry) + np.reshape(bias, (-1, 1, 1)) * np.ones((conv.out_channels, 1, 1))


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
    with pytest.raises(medpeft.MedpeftError, match="a dense α does not fit into a grouped convolution's weight"):
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


def test_ssf_scales_and_shifts_the_last_axis_of_a_linear_layer():
    linear, x = nn.Linear(5, 7), drawn(2, 3, 5)
    model, _, values = applied(linear, "ssf")

    weight, bias = numbers(linear)
    assert_computes(model, x, (x.numpy() @ weight.T + bias) * values["scale"] + values["shift"])


def test_ssf_scales_the_channels_of_a_convolution_also_where_the_width_is_their_number():
    conv, x = nn.Conv2d(3, 8, 1), drawn(2, 3, 8, 8)
    model, _, values = applied(conv, "ssf")

    y = base_convolution(conv, x)
    assert y.shape == (2, 8, 8, 8)
    assert_computes(model, x, y * values["scale"][:, None, None] + values["shift"][:, None, None])


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (2, 6, 6)),
        (nn.BatchNorm1d(6), (4, 6, 6)),
        (nn.BatchNorm2d(6), (2, 6, 6, 6)),
        (nn.BatchNorm3d(6), (2, 6, 2, 6, 6)),
        (nn.GroupNorm(2, 6), (2, 6, 6)),
        (nn.InstanceNorm2d(6, affine=True), (2, 6, 6, 6)),
        (nn.InstanceNorm2d(6), (2, 6, 6, 6)),
        (nn.BatchNorm2d(6, affine=False), (2, 6, 6, 6)),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 6, 6)),
    ],
    ids=str,
)
@pytest.mark.parametrize("training", [False, True])
def test_ssf_scales_the_channels_of_a_norm(norm, shape, training):
    x, norm = drawn(*shape), copy.deepcopy(norm)
    model, _, values = applied(norm, "ssf", batchnorm="adapt")
    model.train(training)
    with medpeft.disabled(model), torch.no_grad():
        y = copy.deepcopy(model)(x).numpy()

    axes = (1,) * (0 if isinstance(norm, nn.LayerNorm) else len(shape) - 2)
    assert_computes(model, x, y * values["scale"].reshape(-1, *axes) + values["shift"].reshape(-1, *axes))


@pytest.mark.parametrize("name", ["LayerNorm2d", "BatchNormAct2d", "GroupNormAct", "GroupNorm1"])
def test_ssf_acts_inside_the_norms_of_timm_before_their_activation(name):
    import timm.layers

    x = drawn(2, 6, 6, 6)
    options = {"group_size": 2} if name == "GroupNormAct" else {}
    norm = getattr(timm.layers, name)(6, **options)
    act = norm.act if name.endswith(("Act", "Act2d")) else nn.Identity()
    model, _, values = applied(norm, "ssf")
    plain = copy.deepcopy(norm)
    del plain._modules["adapters"]
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    if hasattr(plain, "act"):
        plain.act = nn.Identity()

    with torch.no_grad():
        y = plain(x).numpy() * values["scale"][:, None, None] + values["shift"][:, None, None]
        assert_computes(model, x, act(torch.from_numpy(y)).numpy())


def test_ssf_of_the_official_initialisation_is_near_the_identity():
    model = medpeft.apply(nn.Sequential(nn.Linear(2, 4000)), "ssf", head=None, init="official")
    adapter = model[0].adapters["ssf"]

    assert abs(adapter.scale.mean() - 1) < 2e-3
    assert abs(adapter.shift.mean()) < 2e-3
    assert 0.018 < adapter.scale.std() < 0.022
    assert 0.018 < adapter.shift.std() < 0.022


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


def test_adaptformer_in_a_block_written_out_by_hand():
    for family in ("vit", "dinov2"):  # with and without LayerScale
        for given in ("residual", "norm"):
            model, x = make(family), drawn(2, 5, 16)
            plain = copy.deepcopy(model.blocks[0])
            medpeft.apply(model, "adaptformer", bottleneck=3, input=given, scale=0.7)
            randomise_adapters(model)
            (adapter,) = model.blocks[0].adapters.children()
            p = {name: value.detach().numpy() for name, value in adapter.named_parameters()}

            with torch.no_grad():
                stream = x + plain.ls1(plain.attn(plain.norm1(x)))
                normed = plain.norm2(stream)
                branch = plain.ls2(plain.mlp(normed)).numpy()
            entering = (stream if given == "residual" else normed).numpy()
            hidden = np.maximum(entering @ p["down"].T + p["down_bias"], 0)
            expected = stream.numpy() + branch + 0.7 * (hidden @ p["up"].T + p["up_bias"])

            assert_computes(model.blocks[0], x, expected)


def test_the_learnable_scale_of_adaptformer_is_one_parameter():
    model = medpeft.apply(make("vit"), "adaptformer", scale="learnable")

    assert [tuple(p.shape) for n, p in model.named_parameters() if n.endswith(".scale")] == [(), ()]
