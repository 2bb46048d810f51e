"""SSF against its formula, written out in NumPy and float64."""

import copy

import pytest
import torch
from layer_oracles import applied, assert_computes, base_convolution, drawn, numbers
from torch import nn

import medpeft


def test_ssf_scales_and_shifts_the_last_axis_of_a_linear_layer():
    linear, x = nn.Linear(5, 7), drawn(2, 3, 5)
    model, _, values = applied(linear, "ssf")

    weight, bias = numbers(linear)
    assert_computes(model, x, (x.numpy() @ weight.T + bias) * values["scale"] + values["shift"])


def test_ssf_of_a_single_vector_has_the_gradients_of_a_batch_of_one():
    model, adapter, _ = applied(nn.Linear(5, 7), "ssf")
    x, upstream = drawn(5), drawn(7, seed=9)

    (model(x) * upstream).sum().backward()
    found = adapter.scale.grad.clone(), adapter.shift.grad.clone()
    model.zero_grad()
    (model(x[None]) * upstream).sum().backward()

    torch.testing.assert_close(found, (adapter.scale.grad, adapter.shift.grad), rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ssf_of_a_norm_without_weights_starts_as_the_base_to_the_last_bit(dtype, groups):
    norms = [nn.BatchNorm2d(6, affine=False), nn.InstanceNorm2d(6), nn.GroupNorm(groups, 6, affine=False)]
    model, x = nn.Sequential(*norms).to(dtype).eval(), drawn(4, 6, 5, 5).to(dtype)
    base = model(x)
    assert torch.equal(medpeft.apply(model, "ssf", head=None)(x), base)


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
