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


def test_dora_learns_the_length_of_every_row_apart_from_its_direction():
    linear, x = nn.Linear(5, 7), drawn(2, 5)
    model, _, p = applied(linear, "lora", rank=2, dora=True, alpha=3.0)

    weight, bias = numbers(linear)
    changed = weight + 1.5 * p["up"] @ p["down"]
    changed *= (p["magnitude"] / np.linalg.norm(changed, axis=1))[:, None]
    assert p["magnitude"].shape == (7,)
    assert_computes(model, x, x.numpy() @ changed.T + bias)


def test_the_gradients_of_dora_are_the_papers_with_the_length_a_constant():
    linear, x = nn.Linear(5, 7), drawn(2, 5)
    model, adapter, p = applied(linear, "lora", rank=2, dora=True, alpha=3.0)
    upstream = drawn(2, 7, seed=9)
    (model(x) * upstream).sum().backward()

    changed = numbers(linear)[0] + 1.5 * p["up"] @ p["down"]
    length = np.linalg.norm(changed, axis=1, keepdims=True)
    wrt_weight = upstream.numpy().T @ x.numpy()
    # Eq. 11 of Liu et al. (2024), arXiv 2402.09353; with the length differentiated, Eq. 6, the projection would stay in.
    wrt_direction = p["magnitude"][:, None] / length * wrt_weight
    projected = wrt_direction - (wrt_direction * changed).sum(1, keepdims=True) * changed / length**2
    expected = {
        "magnitude": (wrt_weight * changed).sum(1) / length[:, 0],
        "up": 1.5 * wrt_direction @ p["down"].T,
        "down": 1.5 * p["up"].T @ wrt_direction,
    }
    for name, gradient in expected.items():
        assert np.allclose(getattr(adapter, name).grad.numpy(), gradient, rtol=1e-12), name
    assert not np.allclose(adapter.up.grad.numpy(), 1.5 * projected @ p["down"].T, rtol=0.1)


def test_the_gradients_of_dora_are_those_of_its_parts_in_a_fused_projection():
    model = randomise_adapters(medpeft.apply(make("vit"), "lora", rank=2, dora=True), size=0.3)
    qkv, x = model.blocks[0].attn.qkv, drawn(2, 16)
    adapter, upstream = qkv.adapters["lora"], drawn(2, 48, seed=9)
    (qkv(x) * upstream).sum().backward()

    for i, part in enumerate((0, 2)):
        rows, own = slice(16 * part, 16 * part + 16), slice(16 * i, 16 * i + 16)
        down = adapter.down[2 * i : 2 * i + 2].detach()
        changed = (qkv.weight[rows] + adapter.up[own] @ down).detach()
        wrt_weight, length = upstream[:, rows].T @ x, changed.norm(dim=1)
        assert torch.allclose(adapter.magnitude.grad[own], (wrt_weight * changed).sum(1) / length, rtol=1e-12)
        factor = adapter.magnitude[own].detach() / length
        assert torch.allclose(adapter.up.grad[own], factor[:, None] * wrt_weight @ down.T, rtol=1e-12)


@pytest.mark.parametrize(
    ("base", "adapters"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.bfloat16, torch.float64),
    ],
)
def test_dora_starts_as_the_base_in_every_precision_and_merges_into_it(base, adapters):
    model, x = nn.Sequential(nn.Linear(64, 64)).to(base), drawn(4, 64).to(base)
    weight, y = model[0].weight.detach().clone(), model(x)
    medpeft.apply(model, "lora", head=None, target="*", dora=True, dtype=adapters)

    assert torch.equal(model(x), y)
    medpeft.merge(model)
    assert torch.equal(model[0].weight, weight)


def test_dora_learns_a_row_of_zeros_too():
    linear, x = nn.Linear(5, 7).double(), drawn(2, 5)
    with torch.no_grad():
        linear.weight[3] = 0
    y = linear(x)
    model = medpeft.apply(nn.Sequential(linear), "lora", rank=2, dora=True, head=None, target="*")
    assert torch.equal(model(x), y)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.isclose(model(x)[:, 3], y[:, 3]).any()


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
        ({"init": "zero"}, "init='zero' is not known: choose one of 'kaiming', 'pissa', 'olora'"),
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
