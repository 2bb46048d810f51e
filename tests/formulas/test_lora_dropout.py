"""Dropout of LoRA and DoRA: which input it acts on, in training alone, and where it cannot act."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from layer_oracles import applied, assert_computes, drawn, numbers
from models import make, randomise, randomise_adapters
from peft import LoraConfig, get_peft_model
from tiny_places import PLACES, apply_at, build, example
from torch import nn

import medpeft

CALLED = [
    "linear",
    "linear without bias",
    "Conv1D of transformers",
    "fused qkv",
    "conv 1-d",
    "conv 2-d with stride",
    "conv 2-d reflecting",
    "conv 3-d",
    "grouped conv",
    "depthwise conv",
    "transposed conv",
    "grouped transposed conv",
]
"""Places whose layers are called, so that their input can be dropped."""


def seeded(model, x):
    """The output of a model in training, with the same mask each time."""
    torch.manual_seed(0)
    return model.train()(x)


def dropped(x):
    """What that mask leaves of the input of the first dropout."""
    torch.manual_seed(0)
    return F.dropout(x, 0.5)


def test_dropout_acts_on_the_input_in_training_alone():
    linear, x = nn.Linear(5, 7), drawn(4, 5)
    model, _, p = applied(linear, "lora", rank=2, dropout=0.5)
    weight, bias = numbers(linear)
    base = x.numpy() @ weight.T + bias

    assert_computes(model, x, base + x.numpy() @ (p["up"] @ p["down"]).T)
    trained = seeded(model, x)
    expected = base + dropped(x).numpy() @ (p["up"] @ p["down"]).T
    torch.testing.assert_close(trained, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_dropout_at_an_embedding_drops_the_change_of_a_token(init):
    embedding, tokens = nn.Embedding(7, 5), torch.arange(600).view(2, 300) % 7
    model, _, _ = applied(embedding, "lora", rank=2, dropout=0.25, init=init)
    base = F.embedding(tokens, embedding.weight.double())
    whole = model.eval()(tokens) - base
    assert whole.abs().min() > 1e-9

    kept = (seeded(model, tokens) - base) / whole
    share = kept[..., :1]
    torch.testing.assert_close(kept, share.expand_as(kept), rtol=1e-6, atol=1e-6)
    assert set(share.round(decimals=6).unique().tolist()) == {0.0, round(1 / 0.75, 6)}
    assert 0.15 < (share < 0.5).double().mean() < 0.35


def test_dropout_of_dora_acts_on_all_that_it_adds_to_the_layer():
    linear, x = nn.Linear(5, 7), drawn(4, 5)
    model, adapter, _ = applied(linear, "lora", rank=2, alpha=3.0, dora=True, dropout=0.5)
    weight, bias = linear.weight.detach(), linear.bias.detach()
    low_rank = 1.5 * (adapter.up @ adapter.down).detach()
    stretch = (adapter.magnitude.detach() / (weight + low_rank).norm(dim=1))[:, None]

    assert_computes(model, x, (x @ (stretch * (weight + low_rank)).T + bias).numpy())
    # (m/‖V‖ − 1)·W·d + m/‖V‖·s·B·A·d, on the input d that dropout has left.
    added = dropped(x) @ ((stretch - 1) * weight + stretch * low_rank).T
    torch.testing.assert_close(seeded(model, x), x @ weight.T + bias + added, rtol=1e-12, atol=1e-12)


def test_the_gradients_of_dora_with_dropout_are_those_of_the_dropped_input():
    linear, x, upstream = nn.Linear(5, 7), drawn(4, 5).requires_grad_(), drawn(4, 7, seed=9)
    model, adapter, _ = applied(linear, "lora", rank=2, alpha=3.0, dora=True, dropout=0.5)
    (seeded(model, x) * upstream).sum().backward()

    with torch.no_grad():
        left = dropped(x)
        changed = linear.weight + 1.5 * adapter.up @ adapter.down
        length = changed.norm(dim=1, keepdim=True)  # A constant in backward, as without dropout.
        stretch = adapter.magnitude[:, None] / length
        wrt_weight = upstream.T @ left
        mask = left / x
        expected = {
            "magnitude": (wrt_weight * changed).sum(1) / length[:, 0],
            "up": 1.5 * (stretch * wrt_weight) @ adapter.down.T,
            "down": 1.5 * adapter.up.T @ (stretch * wrt_weight),
        }
        wrt_x = upstream @ linear.weight + mask * (upstream @ (stretch * changed - linear.weight))
    for name, gradient in expected.items():
        torch.testing.assert_close(getattr(adapter, name).grad, gradient, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, wrt_x, rtol=1e-12, atol=1e-12)
    assert linear.weight.grad is None


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("place", CALLED)
def test_with_dropout_every_layer_starts_as_the_base_in_training_too(place, dora):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, x = build(place, dtype).train(), example(place, dtype)
        y = model(x)
        apply_at(place, model, "lora", dora=dora, dropout=0.5, rank=2)
        assert torch.equal(model(x), y), (dtype, "train")
        assert torch.equal(model.eval()(x), y), (dtype, "eval")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("place", [place for place in CALLED if place != "fused qkv"])
def test_the_change_of_every_layer_acts_on_the_dropped_input(place, dora):
    model, x = build(place, torch.float64), example(place, torch.float64)
    base = copy.deepcopy(model)
    randomise_adapters(apply_at(place, model, "lora", dora=dora, dropout=0.5, rank=2), size=0.3)
    with medpeft.merged(model):
        merged, y = copy.deepcopy(model[0]), model(x)

    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    left = dropped(x)
    expected = base(x) + merged(left) - base(left)
    torch.testing.assert_close(seeded(model, x), expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(seeded(model, x), y)


def test_the_change_of_a_fused_projection_acts_on_the_dropped_input_in_its_parts_alone():
    model = make("vit").double()
    qkv, x = model.blocks[0].attn.qkv, drawn(2, 3, 16)
    weight, bias = qkv.weight.detach().clone(), qkv.bias.detach()
    randomise_adapters(medpeft.apply(model, "lora", rank=2, dora=True, dropout=0.5), size=0.3)
    with medpeft.merged(model):
        merged = qkv.weight.detach().clone()

    assert torch.equal(merged[16:32], weight[16:32])
    expected = F.linear(x, weight, bias) + F.linear(dropped(x), merged - weight)
    torch.testing.assert_close(seeded(qkv, x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 7), (4, 5)),
        (nn.Linear(5, 7, bias=False), (2, 3, 5)),
        (nn.Conv1d(4, 6, 3), (2, 4, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 6, 6)),
        (nn.Conv3d(4, 6, 2), (2, 4, 3, 3, 3)),
    ],
)
def test_dropout_is_pefts_in_training_and_in_its_gradients(layer, shape, dora):
    base, x = randomise(nn.Sequential(copy.deepcopy(layer)).double()), drawn(*shape)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=dora, lora_dropout=0.5)
    theirs = get_peft_model(copy.deepcopy(base), config).double()
    options = {"rank": 2, "alpha": 3, "dora": dora, "dropout": 0.5}
    ours = randomise_adapters(medpeft.apply(base, "lora", target="0", head=None, **options), size=0.3)
    adapter, tuned = ours[0].adapters["lora"], theirs.base_model.model[0]
    pairs = {"down": tuned.lora_A["default"].weight, "up": tuned.lora_B["default"].weight}
    if dora:
        pairs["magnitude"] = tuned.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        for name, parameter in pairs.items():
            parameter.copy_(getattr(adapter, name).view_as(parameter))

    outputs = [seeded(ours, x), seeded(theirs, x)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-11, atol=1e-12)
    for y in outputs:
        y.square().sum().backward()
    for name, parameter in pairs.items():
        gradient = getattr(adapter, name).grad.view_as(parameter)
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("beside", ["svdiff", "vera", "ssf"])
@pytest.mark.parametrize("place", ["linear", "conv 2-d with stride"])
def test_beside_another_method_only_the_change_of_dora_is_dropped(place, beside):
    model, x = build(place, torch.float64), example(place, torch.float64)
    methods = {beside: {}, "lora": {"rank": 2, "dora": True, "dropout": 0.5}}
    randomise_adapters(apply_at(place, model, methods), size=0.3)
    layer, y = model[0], model(x)
    with medpeft.merged(model):
        merged = copy.deepcopy(layer)
    torch.testing.assert_close(merged(x), y, rtol=1e-11, atol=1e-12)

    trained = seeded(model, x)
    layer.adapters["lora"].merged = lambda weight, bias: (weight, bias)
    with medpeft.merged(model):
        others = copy.deepcopy(layer)
    left = dropped(x)
    expected = others(x) + merged(left) - others(left)
    torch.testing.assert_close(trained, expected, rtol=1e-11, atol=1e-12)


def test_dropout_of_dora_takes_an_input_by_keyword_and_autocast():
    linear, x = nn.Linear(5, 7), drawn(4, 5).float()
    model, _, _ = applied(linear, "lora", dtype=torch.float32, rank=2, dora=True, dropout=0.5)
    expected = seeded(model, x)

    torch.manual_seed(0)
    assert torch.equal(linear(input=x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        low = seeded(model, x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.05)


def own_forward(layer):
    """A layer with a forward of the user's own on the instance."""
    layer.forward = layer.forward
    return layer


class Shifted(nn.Linear):
    """A linear layer that adds a constant of its own, which must not be added for the change too."""

    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (nn.Embedding(5, 4), {"dora": True}),
        (nn.Embedding(5, 4, max_norm=1.0), {}),
        (own_forward(nn.Linear(4, 4)), {"dora": True}),
        (Shifted(4, 4), {"dora": True}),
        (timm.layers.StdConv2d(4, 4, 3), {"dora": True}),
        (timm.layers.StdConv2d(4, 4, 3), {}),
    ],
)
def test_dropout_is_refused_where_no_input_can_be_dropped(layer, options):
    model = nn.Sequential(layer)
    keys = list(model.state_dict())
    with pytest.raises(medpeft.MedpeftError, match=r"dropout=0\.5 cannot act at 0, where LoRA changes"):
        medpeft.apply(model, "lora", head=None, target="*", dropout=0.5, rank=2, **options)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_dropout_is_refused_where_a_parent_reads_the_weight(options):
    with pytest.raises(
        medpeft.MedpeftError,
        match=r"dropout=0\.5 cannot act at blocks\.0\.attn\.qkv, where LoRA changes the weight",
    ):
        medpeft.apply(make("beit"), "lora", dropout=0.5, **options)


def test_every_place_that_is_called_is_among_those_tried():
    uncalled = {
        "qkv that is read",
        "separate q, k, v",
        "transformer",
        "residual block",
        "conv 2-d",
        "conv 1×1",
    }
    tried = {place for place in PLACES if "Norm" not in place and "embedding" not in place}
    assert {place for place in tried - uncalled if "Multihead" not in place} == set(CALLED)
