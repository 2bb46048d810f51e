"""SSF against its formula, written out in NumPy and float64."""

import copy
import pickle

import pytest
import torch
from layer_oracles import applied, assert_computes, base_convolution, drawn, numbers
from models import make, randomise_adapters
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


def norms_beside_each_other(norm, dtype, training):
    """An adapted norm, and a copy of it whose adapter is watched, so that it goes the general way."""
    model = nn.Sequential(copy.deepcopy(norm)).to(dtype)
    medpeft.apply(model, "ssf", head=None, batchnorm="adapt")
    with torch.no_grad():
        model[0].adapters.ssf.scale.add_(drawn(6).to(dtype))
        model[0].adapters.ssf.shift.add_(drawn(6, seed=2).to(dtype))
    model.train(training)
    watched = copy.deepcopy(model)
    watched[0].adapters.ssf.register_forward_hook(lambda *_: None)
    return model, watched


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (2, 5, 6)),
        (nn.LayerNorm(6, bias=False), (2, 5, 6)),
        (nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6)),
        (nn.BatchNorm2d(6), (2, 6, 4, 4)),
        (nn.GroupNorm(2, 6), (2, 6, 4, 4)),
    ],
    ids=str,
)
def test_ssf_of_a_norm_in_one_step_gives_the_bits_of_the_general_way(norm, shape, training, dtype):
    model, watched = norms_beside_each_other(norm, dtype, training)
    x = drawn(*shape).to(dtype)

    found, expected = model(x), watched(x)
    found.square().sum().backward()
    expected.square().sum().backward()

    assert torch.equal(found, expected)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (watched.get_parameter(name).grad is None)
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, watched.get_parameter(name).grad), name
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, watched.get_buffer(name)), name
    with torch.no_grad():
        assert torch.equal(model.eval()(x), watched.eval()(x))


def test_ssf_asks_a_norm_and_a_layer_in_one_step_and_under_autocast_in_two(monkeypatch):
    from medpeft.formulas.ssf import SSF

    answers, plain = [], SSF.with_layer

    def watched(self, layer, x):
        answers.append(plain(self, layer, x))
        return answers[-1]

    monkeypatch.setattr(SSF, "with_layer", watched)
    model = medpeft.apply(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), "ssf", head=None)
    x = torch.randn(2, 6)
    model(x)
    assert all(isinstance(answer, torch.Tensor) for answer in answers)
    assert len(answers) == 2
    answers.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert answers[0] is None, "autocast casts a weight otherwise than the norm's own"


def test_a_joining_adapter_on_the_weight_is_followed_by_those_on_the_output(own_registry):
    norm, x = nn.Sequential(nn.LayerNorm(6)), torch.randn(2, 6)

    @medpeft.register("twice_the_output")
    class Twice(medpeft.Adapter):
        """Twice the output."""

        layers = (nn.LayerNorm,)

        def __init__(self, site):
            super().__init__(site)
            self.factor = nn.Parameter(torch.full((), 2.0))

        def forward(self, x, y):
            return y * self.factor

    expected = 2 * norm(x)
    medpeft.apply(norm, "ssf+twice_the_output", head=None)
    assert norm[0].adapters.order.joining == "ssf"
    assert norm[0].adapters.order.leaving_later == ("twice_the_output",)
    torch.testing.assert_close(norm(x), expected)


def test_ssf_of_a_weight_that_a_parent_reads_acts_on_it_in_a_call_of_the_layer_too():
    model = randomise_adapters(medpeft.apply(make("beit"), "ssf"))
    qkv = next(module for name, module in model.named_modules() if name.endswith("attn.qkv"))
    x = torch.randn(2, qkv.in_features, dtype=qkv.weight.dtype)

    assert qkv.adapters.ssf.shift is None
    weight = qkv.weight * qkv.adapters.ssf.scale[:, None]
    assert torch.equal(qkv(x), nn.functional.linear(x, weight, qkv.bias))


def test_ssf_that_was_pickled_before_there_was_one_step_computes_the_same():
    layers = nn.Linear(6, 8), nn.LayerNorm(8)
    model, x = medpeft.apply(nn.Sequential(*layers), "ssf", head=None), torch.randn(4, 6)
    older = copy.deepcopy(randomise_adapters(model))
    for layer in older:
        del layer.adapters.__dict__["order"]
        del layer.adapters.ssf.__dict__["joins_norm"]
        del layer.adapters.ssf.__dict__["joins_layer"]
    older = pickle.loads(pickle.dumps(older))

    assert older[1].adapters.ssf.with_layer(older[1], torch.randn(4, 8)) is None
    assert torch.equal(older(x), model(x))
