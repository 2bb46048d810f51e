"""Starts of LoRA's matrices, its own bias, and both against peft in float64."""

import copy

import numpy as np
import pytest
import torch
from layer_oracles import applied, assert_computes, drawn, numbers
from models import example, make, randomise, randomise_adapters
from peft import EvaConfig, LoraConfig, get_peft_model
from peft.tuners.lora.eva import get_eva_state_dict
from tiny_places import Attention, ReadingAttention
from torch import nn

import medpeft


def adapter_of(layer, **options):
    model = medpeft.apply(nn.Sequential(layer), "lora", head=None, target="*", **options)
    return model, model[0].adapters["lora"]


def test_gaussian_draws_a_with_a_deviation_of_one_over_the_rank_as_peft_does():
    _, adapter = adapter_of(nn.Linear(4000, 7), rank=4, init="gaussian")
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="gaussian")
    theirs = get_peft_model(nn.Sequential(nn.Linear(4000, 7)), config).base_model.model[0]

    assert not adapter.up.any()
    assert 0.24 < adapter.down.std() < 0.26
    assert 0.24 < theirs.lora_A["default"].weight.std() < 0.26


@pytest.mark.parametrize("layer", [nn.Linear(60, 40), nn.Conv2d(6, 40, 3), Attention(16)], ids=str)
def test_orthogonal_starts_with_two_matrices_whose_product_is_zero_and_both_learn(layer):
    layer = layer.double()
    model, x = nn.Sequential(layer), drawn(2, 6, 5, 5) if isinstance(layer, nn.Conv2d) else None
    if x is None:
        x = drawn(2, 4, 16 if isinstance(layer, Attention) else 60)
    base = model(x)
    model = medpeft.apply(model, "lora", head=None, target="*", rank=4, init="orthogonal")

    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-15)
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora." in name:
            assert parameter.any()
            assert parameter.grad.any()


def test_orthogonal_has_pefts_distribution_and_refuses_an_odd_rank():
    _, adapter = adapter_of(nn.Linear(4000, 3000), rank=4, init="orthogonal")
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights="orthogonal")
    theirs = get_peft_model(nn.Sequential(nn.Linear(4000, 3000)), config).base_model.model[0]

    # Two numbers of deviation 0.1 make every column, so that a column's mean square is 0.02.
    for down in (adapter.down, theirs.lora_A["default"].weight):
        assert down.detach().square().sum(0).mean().item() == pytest.approx(0.02, rel=0.1)
        assert torch.linalg.matrix_rank(down.detach()) == 2
    for up in (adapter.up, theirs.lora_B["default"].weight):
        assert up.detach().square().sum(1).mean().item() == pytest.approx(0.02, rel=0.1)
    with pytest.raises(medpeft.MedpeftError, match="init='orthogonal' halves the rank, and rank=3 is odd"):
        medpeft.plan(
            nn.Sequential(nn.Linear(5, 7)), "lora", head=None, target="*", rank=3, init="orthogonal"
        ).table()


def batches(*shape, of=3):
    """Batches whose directions of largest variance are far apart."""
    spread = torch.linspace(3, 0.3, shape[-1], dtype=torch.float64).square()
    return [drawn(*shape, seed=i) * spread + 1.0 for i in range(of)]


def test_eva_starts_from_the_directions_in_which_the_input_varies_most_however_it_is_divided():
    data = batches(5, 4, 6)
    model, adapter = adapter_of(nn.Linear(6, 7).double(), rank=2, init="eva", data=iter(data))
    _, of_one = adapter_of(nn.Linear(6, 7).double(), rank=2, init="eva", data=[torch.cat(data)])
    rows = torch.cat(data).flatten(0, 1).numpy()
    _, _, right = np.linalg.svd(rows - rows.mean(0), full_matrices=False)

    down = adapter.down.detach().numpy()
    assert np.abs(np.abs(np.sum(down * right[:2], 1)) - 1).max() < 1e-12
    assert not adapter.up.any()
    torch.testing.assert_close(of_one.down, adapter.down, rtol=0, atol=1e-12)
    assert "eva" in str(medpeft.adapters.record.Adapted.of(model).record.methods)


def test_every_part_of_a_fused_projection_starts_from_the_same_directions_and_a_file_needs_no_data(tmp_path):
    data = batches(5, 4, 8)
    model = nn.Sequential(randomise(Attention()).double())
    medpeft.apply(model, "lora", head=None, rank=2, init="eva", data=data)
    down = model[0].qkv.adapters["lora"].down
    assert torch.equal(down[:2], down[2:])

    randomise_adapters(model)
    medpeft.save(model, tmp_path / "eva.safetensors")
    again = nn.Sequential(randomise(Attention()).double())
    medpeft.load(again, tmp_path / "eva.safetensors")
    assert torch.equal(again(data[0]), model(data[0]))


@pytest.mark.filterwarnings("ignore:lora with eva initialization")
def test_eva_finds_pefts_directions_and_trains_as_peft_does():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.second(torch.tanh(self.first(x)))

    data, net = batches(40, 6, of=1), randomise(Net().double())
    config = LoraConfig(
        r=2, lora_alpha=3, target_modules=["first"], init_lora_weights="eva", eva_config=EvaConfig()
    )
    theirs = get_peft_model(copy.deepcopy(net), config)
    found = get_eva_state_dict(
        theirs,
        data * 3,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
    )
    (components,) = found.values()
    medpeft.apply(net, "lora", target="first", head=None, rank=2, alpha=3.0, init="eva", data=data * 3)
    adapter, layer = net.first.adapters["lora"], theirs.base_model.model.first
    signs = (adapter.down * components.double()).sum(1, keepdim=True).sign()
    torch.testing.assert_close(signs * adapter.down, components.double(), rtol=0, atol=1e-4)

    layer.lora_A["default"].weight = nn.Parameter(adapter.down.detach().clone())
    layer.lora_B["default"].double()
    assert_same_after_a_step(net, theirs, data[0])


def assert_same_after_a_step(ours, theirs, x):
    """Both compute the same, also after a step of SGD in float64."""
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)
    start = ours(x).detach()
    for model in (ours, theirs):
        model(x).square().sum().backward()
        with torch.no_grad():
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.sub_(parameter.grad, alpha=1e-4)
    assert (ours(x) - start).abs().max() > 1e-6
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_equals_pefts_with_the_same_start_also_after_a_step(kind, init, bias):
    layer, x = nn.Linear(6, 8).double(), drawn(5, 6)
    if kind == "conv":
        layer, x = nn.Conv2d(4, 8, 3, padding=1).double(), drawn(2, 4, 5, 5)
        init = "gaussian"  # peft starts a convolution in no other way.
    their_init = True if bias else init  # peft's bias goes with its own start alone.
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=their_init, lora_bias=bias)
    theirs = get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).double()
    net, adapter = adapter_of(layer, rank=2, alpha=3.0, init=init, bias=bias)
    their = theirs.base_model.model[0]
    with torch.no_grad():
        if bias:
            adapter.bias.normal_()
            their.lora_B["default"].bias.copy_(adapter.bias)
        their.lora_A["default"].weight.copy_(adapter.down.view_as(their.lora_A["default"].weight))
        their.lora_B["default"].weight.copy_(adapter.up.view_as(their.lora_B["default"].weight))

    assert_same_after_a_step(net, theirs, x)
    with medpeft.merged(net):
        torch.testing.assert_close(net(x), theirs(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"dropout": 0.5}])
def test_the_bias_of_a_linear_layer_is_added_by_the_same_factor(options):
    linear, x = nn.Linear(5, 7), drawn(2, 3, 5)
    model, adapter, p = applied(linear, "lora", rank=2, alpha=6.0, bias=True, **options)

    weight, bias = numbers(linear)
    changed = weight + 3 * p["up"] @ p["down"]
    if "magnitude" in p:
        changed *= (p["magnitude"] / np.linalg.norm(changed, axis=1))[:, None]
    assert_computes(model, x, x.numpy() @ changed.T + bias + 3 * p["bias"])
    with medpeft.merged(model):
        assert_computes(model, x, x.numpy() @ changed.T + bias + 3 * p["bias"])
    assert adapter.bias.shape == (7,)


def test_a_layer_without_a_bias_gets_one_when_it_is_merged():
    model, _, p = applied(nn.Linear(5, 7, bias=False), "lora", rank=2, bias=True)
    with pytest.warns(UserWarning, match=r"merge created 0\.bias"):
        medpeft.merge(model)
    assert np.array_equal(model[0].bias.detach().numpy(), p["bias"])


def test_the_bias_of_a_fused_projection_is_that_of_its_parts():
    model, x = make("vit"), drawn(2, 3, 16)
    qkv = model.blocks[0].attn.qkv
    medpeft.apply(model, "lora", rank=2, parts="qv", bias=True)
    base = qkv(x)
    with torch.no_grad():
        qkv.adapters["lora"].bias.fill_(1.0)

    added = (qkv(x) - base)[0, 0]
    torch.testing.assert_close(added, torch.tensor([1.0] * 16 + [0.0] * 16 + [1.0] * 16, dtype=torch.float64))
    with medpeft.merged(model):
        torch.testing.assert_close((qkv(x) - base)[0, 0], added)


REFUSED = [
    (nn.Embedding(4, 3), {"bias": True}, "bias=True has no place at 0: an embedding adds no bias"),
    (nn.Linear(6, 7), {"init": "eva"}, "init='eva' starts from what enters the layers: pass data= to apply"),
    (
        nn.Conv2d(3, 4, 3),
        {"init": "eva", "data": []},
        "init='eva' starts from what enters a linear layer, and at 0",
    ),
    (ReadingAttention(), {"init": "eva", "data": []}, r"at 0\.qkv it cannot be seen"),
    (nn.Linear(6, 7), {"data": [torch.zeros(2, 6)]}, "none of 'lora' does: leave it out, or pass init='eva'"),
    (nn.Linear(6, 7), {"init": "eva", "data": 5}, "data=5 must be batches, each an input of the model"),
    (nn.Linear(6, 7), {"init": "eva", "data": []}, "Nothing entered 0 while the model ran on the data"),
    (
        nn.Linear(6, 7),
        {"init": "eva", "data": [torch.ones(9, 6)]},
        "varies in 0 directions on the data, and rank=2",
    ),
    (
        nn.Linear(6, 7),
        {"init": "eva", "data": [torch.full((9, 6), torch.nan)]},
        "What enters 0 is not finite",
    ),
    (
        nn.Linear(6, 7),
        {"init": "eva", "data": [torch.ones(9, 5)]},
        "Sequential does not run on example_input",
    ),
]


@pytest.mark.parametrize(("layer", "options", "message"), REFUSED)
def test_what_cannot_be_is_refused_and_leaves_no_trace(layer, options, message):
    model = nn.Sequential(layer).train()
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(model, "lora", head=None, target="*", rank=2, **options)

    for module in model.modules():
        assert module.training
        assert not module._forward_pre_hooks
        assert "adapters" not in module._modules


def test_data_are_seen_in_eval_mode_and_the_modes_come_back():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 7)).train()
    model[0].eval()
    medpeft.apply(model, "lora", head=None, target="1", rank=2, init="eva", data=[drawn(9, 6).float()])

    assert not model[0].num_batches_tracked
    assert [module.training for module in (model, model[0], model[1])] == [True, False, True]


def test_a_plan_needs_no_data():
    planned = medpeft.plan(make("vit"), "lora", head=None, rank=2, init="eva", bias=True)
    assert planned.trainable == 2 * (2 * 2 * 16 + 2 * 16 * 2 + 2 * 16)


def test_a_bias_of_keys_alone_is_exempt_from_the_check_as_the_layers_own_is():
    model = medpeft.apply(make("hf_vit"), "lora", rank=2, parts="k", bias=True)
    exempt = medpeft.check(model, example("hf_vit")).exempt
    assert {name.partition(".adapters.")[2] for name in exempt} == {"lora.bias"}
