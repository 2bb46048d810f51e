"""LoRA and its variants against their formulas, written out in NumPy and float64."""

import copy

import numpy as np
import pytest
import torch
from layer_oracles import applied, assert_computes, base_convolution, convolved, drawn, numbers
from models import make, randomise_adapters
from peft import LoraConfig, get_peft_model
from torch import nn

import medpeft


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 1.0), ({"alpha": 6.0}, 3.0), ({"alpha": 6.0, "rslora": True}, 6 / 2**0.5)]
)
def test_a_linear_layer_adds_the_product_of_both_matrices(options, scale):
    linear, x = nn.Linear(5, 7), drawn(2, 3, 5)
    model, _, p = applied(linear, "lora", rank=2, **options)

    weight, bias = numbers(linear)
    assert p["down"].shape == (2, 5)
    assert p["up"].shape == (7, 2)
    assert_computes(model, x, x.numpy() @ (weight + scale * p["up"] @ p["down"]).T + bias)


@pytest.mark.parametrize("parts", ["q", "qv", "qkv", "vk"])
def test_a_fused_projection_has_two_matrices_for_each_part(parts):
    model = make("vit")
    qkv, x = model.blocks[0].attn.qkv, drawn(2, 3, 16)
    weight, bias = numbers(qkv)
    medpeft.apply(model, "lora", rank=2, parts=parts, alpha=3.0)
    randomise_adapters(model)
    p = {name: value.detach().numpy() for name, value in qkv.adapters["lora"].named_parameters()}

    change, adapted = np.zeros((3, 16, 16)), [part for part in "qkv" if part in parts]
    for i, part in enumerate(adapted):
        change["qkv".index(part)] = p["up"][16 * i : 16 * (i + 1)] @ p["down"][2 * i : 2 * (i + 1)]
    assert len(p["down"]) == 2 * len(adapted)
    assert_computes(qkv, x, x.numpy() @ (weight + 1.5 * change.reshape(48, 16)).T + bias)


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": 1},
        {"padding": 2, "dilation": 2, "stride": 2},
        {"padding": 1, "groups": 2},
        {"padding": 0, "groups": 4, "stride": 2},
    ],
)
def test_a_convolution_runs_as_two_and_merges_into_one(geometry):
    conv, x = nn.Conv2d(4, 8, 3, **geometry), drawn(2, 4, 9, 7)
    model, _, p = applied(conv, "lora", rank=2, alpha=3.0)
    weight, _ = numbers(conv)
    geometry = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0]}
    down = p["down"].reshape(2, 4 // conv.groups, 3, 3)

    # Every group of inputs goes through the same A, and every output channel mixes what its own group gave.
    hidden = [convolved(part, down, **geometry) for part in np.split(x.numpy(), conv.groups, axis=1)]
    mixed = [
        np.einsum("or,nrhw->nohw", up, h)
        for up, h in zip(np.split(p["up"], conv.groups), hidden, strict=True)
    ]
    expected = base_convolution(conv, x) + 1.5 * np.concatenate(mixed, axis=1)

    assert_computes(model, x, expected)
    with medpeft.merged(model):
        assert np.allclose(
            conv.weight.detach().numpy(),
            weight + 1.5 * (p["up"] @ p["down"]).reshape(weight.shape),
            atol=1e-13,
        )
        assert_computes(model, x, expected)


def test_a_transposed_convolution_adds_the_product_to_its_weight():
    layer, x = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), drawn(2, 4, 5, 5)
    weight = layer.double().weight.detach()
    model, _, p = applied(layer, "lora", rank=2)
    weight = layer.weight.detach().clone()

    changed = weight + torch.from_numpy(p["up"] @ p["down"]).view_as(weight)
    expected = nn.functional.conv_transpose2d(x, changed, layer.bias.detach(), stride=2, padding=1, groups=2)
    assert_computes(model, x, expected.numpy())


def test_an_embedding_adds_the_product_of_both_matrices():
    layer, x = nn.Embedding(6, 4), torch.tensor([[0, 5], [2, 2]])
    model, _, p = applied(layer, "lora", rank=2)

    assert_computes(model, x, (layer.weight.detach().numpy() + p["up"] @ p["down"])[x.numpy()])


@pytest.mark.parametrize("options", [{}, {"dora": True}])
def test_the_row_of_an_embedding_for_padding_is_not_trained(options):
    model, adapter, _ = applied(nn.Embedding(6, 4, padding_idx=1), "lora", rank=2, **options)

    model(torch.tensor([1, 1])).sum().backward()
    assert not any(parameter.grad.any() for parameter in adapter.parameters())
    model(torch.tensor([1, 3])).sum().backward()
    assert [row.any().item() for row in adapter.up.grad] == [False, False, False, True, False, False]


def test_an_embedding_with_a_max_norm_shortens_the_changed_rows():
    layer, x = nn.Embedding(6, 4, max_norm=1.0), torch.arange(6)
    model, _, p = applied(layer, "lora", rank=2)

    rows = layer.weight.detach().numpy() + p["up"] @ p["down"]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    assert (lengths > 1).any()
    # torch adds 1e-7 to the length that it divides by.
    assert np.allclose(model(x).detach().numpy(), np.where(lengths > 1, rows / (lengths + 1e-7), rows), 1e-12)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_start_from_the_weight_and_take_their_start_off(init):
    linear, x = nn.Linear(5, 7).double(), drawn(2, 5)
    weight = linear.weight.detach().numpy()
    model = medpeft.apply(nn.Sequential(linear), "lora", head=None, target="*", rank=2, init=init, alpha=3.0)
    adapter = linear.adapters["lora"]
    start = 1.5 * (adapter.up @ adapter.down).detach().numpy()

    if init == "pissa":
        left, sigma, right = np.linalg.svd(weight, full_matrices=False)
        leading = (left[:, :2] * sigma[:2]) @ right[:2]
    else:
        q, r = np.linalg.qr(weight)
        leading = 1.5 * q[:, :2] @ r[:2]
    assert np.allclose(start, leading, atol=1e-13)

    randomise_adapters(model)
    end = 1.5 * (adapter.up @ adapter.down).detach().numpy()
    assert_computes(model, x, x.numpy() @ (weight + end - start).T + linear.bias.detach().numpy())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("alpha", [0.5, 2, 3.0, 16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_pissa_and_olora_are_pefts_at_first_and_after_a_step_at_every_alpha(init, alpha, rslora):
    linear, x, target = nn.Linear(5, 7), drawn(4, 5).float(), drawn(4, 7, seed=6).float()
    config = LoraConfig(
        r=2, lora_alpha=alpha, target_modules=["0"], init_lora_weights=init, use_rslora=rslora
    )
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(linear)), config)
    ours = nn.Sequential(linear)
    medpeft.apply(ours, "lora", target="0", head=None, rank=2, alpha=alpha, init=init, rslora=rslora)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
    start = ours(x).detach()

    for model in (ours, theirs):
        (model(x) - target).square().sum().backward()
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.sub_(parameter.grad, alpha=0.005)
    assert (ours(x) - start).abs().max() > 1e-3
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf")])
def test_an_alpha_from_which_no_start_can_be_made_is_refused(init, alpha):
    named = f"init='{init}' needs a finite alpha above 0|alpha={alpha} must be a finite number other than 0"
    with pytest.raises(medpeft.MedpeftError, match=named):
        medpeft.apply(
            nn.Sequential(nn.Linear(5, 7)), "lora", head=None, target="*", rank=2, init=init, alpha=alpha
        )


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_above_that_of_the_weight_is_refused(init):
    model = nn.Sequential(nn.Linear(5, 7))
    with pytest.raises(
        medpeft.MedpeftError, match=r"rank=6 is more than a weight of \(7, 5\) has: use init='kaiming'"
    ):
        medpeft.apply(model, "lora", head=None, target="*", rank=6, init=init)


def test_freezing_a_trains_b_alone():
    model = medpeft.apply(make("vit"), "lora", rank=2, freeze_a=True, head=None)

    assert all(name.endswith(".lora.up") for name, p in model.named_parameters() if p.requires_grad)
    assert medpeft.report(model).trainable == 2 * (2 * 16 * 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be a whole number above 0"),
        ({"rank": 2.5}, "rank=2.5 must be a whole number above 0"),
        (
            {"init": "zero"},
            "init='zero' is not known: choose one of 'kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora'",
        ),
        ({"parts": "x"}, "parts='x' must be letters of 'qkvo'"),
        ({"parts": ""}, "parts='' must be letters of 'qkvo'"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(make("vit"), "lora", **options)


def test_the_output_projection_is_a_part_too():
    names = [site.name for _, site in medpeft.plan(make("vit"), "lora", parts="o").sites]

    assert names == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


def test_a_starts_kaiming_uniform_and_b_at_zero():
    adapter = medpeft.apply(nn.Sequential(nn.Linear(400, 7)), "lora", head=None, target="*")[0].adapters[
        "lora"
    ]

    assert not adapter.up.any()
    assert adapter.down.abs().max() <= 400**-0.5
    assert adapter.down.abs().max() > 0.98 * 400**-0.5
