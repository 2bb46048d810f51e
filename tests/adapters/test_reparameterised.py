"""Methods that live in the weights against their papers' formulas, written out in NumPy and float64."""

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.adapters.adapter import parameters_of
from medpeft.adapters.registry import find

WIDTH = 16
METHODS = ("difffit", "fact", "ia3", "oft", "repadapter", "vera")


def drawn(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(layer, method, **options):
    """The layer as a model of its own with random weights, adapted; then the values of its adapter, as NumPy arrays."""
    model = randomise(nn.Sequential(copy.deepcopy(layer)).double().eval())
    medpeft.apply(model, method, head=None, target="*", **options)
    randomise_adapters(model, size=0.3)
    ((_, adapter),) = model[0].adapters.adapters()
    return model, {name.rpartition(".")[2]: p.detach().numpy() for name, p in parameters_of(adapter)}


def weights(layer):
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias


def assert_same(got, expected):
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else got
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def adapted_vit(method, **options):
    """A tiny ViT, adapted with random values, and its first block's base weights as NumPy arrays."""
    model = make("vit")
    base = {name: p.detach().numpy().copy() for name, p in model.blocks[0].named_parameters()}
    medpeft.apply(model, method, **options)
    return randomise_adapters(model, size=0.3), base


def merged_weights(model):
    with medpeft.merged(model):
        return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if ".adapters." not in name}


def normalised(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(x, w, k_scale=1.0, v_scale=1.0, hidden_scale=1.0, gammas=(1.0, 1.0), heads=2):
    """A pre-norm ViT block by hand, with the scales of (IA)³ and DiffFit."""
    qkv = normalised(x, w["norm1.weight"], w["norm1.bias"]) @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    q, k, v = np.split(qkv, 3, -1)
    q, k, v = (np.stack(np.split(part, heads, -1), 1) for part in (q, k * k_scale, v * v_scale))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.concatenate(np.moveaxis(scores / scores.sum(-1, keepdims=True) @ v, 1, 0), -1)
    x = x + gammas[0] * (attended @ w["attn.proj.weight"].T + w["attn.proj.bias"])
    hidden = gelu(normalised(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"])
    return x + gammas[1] * ((hidden_scale * hidden) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


def test_the_block_by_hand_is_that_of_the_model():
    model, base = adapted_vit("linear_probe")
    x = drawn(2, 5, WIDTH)

    assert_same(model.blocks[0](x), block(x.numpy(), base))


def test_ia3_scales_keys_values_and_the_hidden_channels_of_the_mlp():
    model, base = adapted_vit("ia3")
    x = drawn(2, 5, WIDTH)
    k_scale, v_scale = model.blocks[0].attn.qkv.adapters.ia3.scale.detach().numpy().reshape(2, WIDTH)
    hidden_scale = model.blocks[0].mlp.fc2.adapters.ia3.scale.detach().numpy()

    assert hidden_scale.shape == (4 * WIDTH,)
    assert_same(model.blocks[0](x), block(x.numpy(), base, k_scale, v_scale, hidden_scale))


def test_difffit_scales_every_branch_and_trains_every_bias_and_norm():
    model, base = adapted_vit("difffit")
    x = drawn(2, 5, WIDTH)
    gammas = [layer.adapters.difffit.gamma.detach().numpy() for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2)]

    assert_same(model.blocks[0](x), block(x.numpy(), base, gammas=gammas))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name}
    union = medpeft.apply(make("vit"), "bias+norm")
    assert trained == {name for name, p in union.named_parameters() if p.requires_grad}
    assert trained > {"blocks.0.attn.qkv.bias", "norm.weight", "head.weight"}


def test_difffit_takes_a_target_for_its_scales_and_its_biases_alike():
    model = medpeft.apply(make("vit"), "difffit", target="blocks.1")

    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")}
    assert {name.split(".")[1] for name in trained} == {"1"}
    assert {"blocks.1.norm1.weight", "blocks.1.attn.proj.adapters.difffit.gamma"} < trained


LAYERS = [nn.Linear(12, 8), nn.Linear(8, 12, bias=False), nn.Conv2d(8, 6, 1, stride=2)]


def output_of(layer, x, weight, bias):
    """A linear layer or 1×1 convolution with another weight and bias, over NumPy arrays."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T + (0.0 if bias is None else bias)
    steps = x[:, :, :: layer.stride[0], :: layer.stride[1]]
    return np.einsum("oi,nihw->nohw", weight[..., 0, 0], steps) + bias[:, None, None]


def input_for(layer):
    return drawn(3, layer.in_features) if isinstance(layer, nn.Linear) else drawn(2, layer.in_channels, 5, 4)


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

    maps = {id(layer.adapters.repadapter.maps) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)}
    assert len(maps) == 1
    assert maps != {id(model.vit.layers[1].attention.q_proj.adapters.repadapter.maps)}
    branches = len(model.vit.layers) * 2
    report = medpeft.report(model)
    assert report.trainable - report.head == branches * (WIDTH * 8 + 8 + WIDTH * 4 + WIDTH)


def test_repadapter_refuses_dropout_where_only_the_weight_can_act():
    medpeft.apply(make("vit"), "repadapter", dropout=0.1)
    with pytest.raises(
        medpeft.MedpeftError, match=r"dropout=0.1 cannot act at blocks.0.attn.qkv, whose weight blocks.0.attn reads"
    ):
        medpeft.apply(make("beit"), "repadapter", dropout=0.1)


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


def reference_projection(rows, columns, seed):
    """VeRA's frozen matrices, from NumPy's generator without torch."""
    raw = np.random.Philox(key=zlib.crc32(f"{seed}:{rows}x{columns}".encode())).random_raw(rows * columns)
    unit = (raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1
    return (unit.astype(np.float32) * np.float32(math.sqrt(6 / columns))).astype(np.float64).reshape(rows, columns)


def test_vera_scales_frozen_random_matrices_in_queries_and_values():
    model, base = adapted_vit("vera", rank=6, projection_seed=3)
    adapter = model.blocks[0].attn.qkv.adapters.vera
    d, b = adapter.d.detach().numpy().reshape(2, 6), adapter.b.detach().numpy().reshape(2, WIDTH)
    A, B = reference_projection(6, WIDTH, 3), reference_projection(WIDTH, 6, 3)
    change = [np.diag(b[i]) @ B @ np.diag(d[i]) @ A for i in range(2)]

    expected = base["attn.qkv.weight"] + np.concatenate([change[0], np.zeros_like(change[0]), change[1]])
    assert_same(merged_weights(model)["blocks.0.attn.qkv.weight"], expected)
    x = drawn(2, 5, WIDTH)
    assert_same(model.blocks[0](x), block(x.numpy(), {**base, "attn.qkv.weight": expected}))


def test_veras_matrices_never_change():
    model = medpeft.apply(make("vit"), "vera", rank=6)
    matrix = model.blocks[0].attn.qkv.adapters.vera.down.matrix

    # As drawn when the method was first published: a file of then must still mean the same, on any machine.
    assert [value.hex() for value in matrix[0, :3].tolist()] == [
        *("-0x1.6e5ed00000000p-3", "0x1.a3b6600000000p-2", "0x1.2315ec0000000p-2"),
    ]
    assert matrix.abs().max() <= math.sqrt(6 / WIDTH)
    assert abs(matrix.std() - math.sqrt(2 / WIDTH)) < 0.05


@pytest.mark.parametrize("form", ["tt", "tucker"])
def test_fact_is_one_tensor_for_all_weights_of_all_layers(form):
    model, base = adapted_vit("fact", rank=3, scale=0.5, form=form)
    layers = [getattr(model.blocks[i], a).get_submodule(b) for i in (0, 1) for a, b in _LAYERS]
    adapters = [layer.adapters.fact for layer in layers]
    u, v = (getattr(adapters[0].factors, name).detach().numpy() for name in "uv")
    sigma = np.concatenate([adapter.sigma.detach().numpy() for adapter in adapters])
    assert len(sigma) == 12 * 2

    if form == "tucker":
        core = adapters[0].factors.core.detach().numpy()
        change = np.einsum("nj,jkl,ok,il->noi", sigma, core, v, u)
    else:
        change = np.einsum("nkl,ok,il->noi", sigma, v, u)
    merged = merged_weights(model)
    start = 0
    for name, blocks, axis in (("attn.qkv", 3, 0), ("attn.proj", 1, 0), ("mlp.fc1", 4, 0), ("mlp.fc2", 4, 1)):
        stacked = np.concatenate(change[start : start + blocks], axis)
        assert_same(merged[f"blocks.0.{name}.weight"], base[f"{name}.weight"] + 0.5 * stacked)
        start += blocks
    x = drawn(2, 5, WIDTH)
    first = {name.removeprefix("blocks.0."): p for name, p in merged.items() if name.startswith("blocks.0.")}
    assert_same(model.blocks[0](x), block(x.numpy(), first))


_LAYERS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_fact_cuts_off_what_juts_out_of_a_weight(shape):
    outputs, inputs = shape
    layer = nn.Linear(inputs, outputs)
    model, values = alone(layer, "fact", rank=2)
    x, small = input_for(layer), min(shape)
    blocks = np.einsum("nkl,ok,il->noi", values["sigma"], values["v"], values["u"])

    assert len(blocks) == -(-max(shape) // small)
    change = np.concatenate(list(blocks), 0 if outputs > inputs else 1)[:outputs, :inputs]
    weight, bias = weights(model[0])
    assert_same(model(x), x.numpy() @ (weight + change).T + bias)


def test_fact_adapts_attentions_and_mlps_but_not_the_mlps_that_make_positions():
    model = make("maxvit")
    sites = {site.name for _, site in medpeft.plan(model, "fact").sites}

    layers = {name for name, _ in model.named_modules() if name.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))}
    positions = {name for name in layers if ".rel_pos." in name}
    assert positions
    assert sites == layers - positions


@pytest.mark.parametrize("method", METHODS)
def test_every_value_that_a_search_would_try_can_be_applied(method):
    for option, values in find(method).search.items():
        for value in values:
            planned = medpeft.plan(make("vit"), method, **{option: value})
            assert planned.trainable > 0
