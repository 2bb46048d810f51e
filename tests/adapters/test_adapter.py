"""The mechanism: adapters are children of their layers, whose forward brings them in."""

import pytest
import torch
from models import example, make, output, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.adapters.record import adapted_layers, own_state


def hooks(model):
    return [
        (name, hook)
        for name, m in model.named_modules()
        for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())
    ]


def test_an_adapter_is_a_child_of_its_layer():
    model = medpeft.apply(make("vit"), "lora")
    layer = model.blocks[0].attn.qkv

    assert type(layer) is nn.Linear
    assert layer.adapters["lora"].method == "lora"
    assert [name for name, _, _ in adapted_layers(model)] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert [name for name, _ in own_state(model)] == [
        f"blocks.{i}.attn.qkv.adapters.lora.{tensor}" for i in (0, 1) for tensor in ("down", "up")
    ]


def test_the_adapters_of_a_model_that_is_one_layer_have_no_prefix():
    layer = medpeft.apply(nn.Linear(2, 2), "ssf", head=None)

    assert [name for name, _ in own_state(layer)] == ["adapters.ssf.scale", "adapters.ssf.shift"]
    randomise_adapters(layer)
    x = torch.randn(3, 2)
    with medpeft.disabled(layer):
        base = layer(x)
    assert not torch.equal(layer(x), base)


def test_two_weights_of_one_layer_have_adapters_apart():
    model = medpeft.apply(make("multihead_attention_of_other_widths"), "lora", parts="qkv")

    assert list(model.attn.adapters) == ["lora_q_proj_weight", "lora_k_proj_weight", "lora_v_proj_weight"]
    assert [a.down.shape[1] for a in model.attn.adapters.values()] == [16, 8, 4]


def test_adapters_of_the_weight_act_before_those_of_the_output():
    model, x = randomise(nn.Sequential(nn.Linear(3, 5)).double()), torch.randn(2, 3, dtype=torch.float64)
    medpeft.apply(model, {"ssf": {}, "lora": {"dora": True, "target": "*"}}, head=None)
    randomise_adapters(model)
    scale, shift = model[0].adapters["ssf"].parameters()
    weight, _ = model[0].adapters["lora"].merged(model[0].weight, None)

    assert list(model[0].adapters) == ["lora", "ssf"]
    expected = (x @ weight.T + model[0].bias) * scale + shift
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_an_adapted_weight_is_there_for_its_reader_and_never_in_the_layer(monkeypatch):
    model, x = make("beit"), example("beit")
    randomise_adapters(medpeft.apply(model, "lora"))
    layer = model.blocks[0].attn.qkv
    inside, after, read = [], [], []
    model.blocks[0].attn.proj.register_forward_pre_hook(lambda *_: inside.append(layer.weight))
    model.blocks[0].attn.register_forward_hook(lambda *_: after.append(layer.weight))
    linear = nn.functional.linear
    monkeypatch.setattr(
        nn.functional,
        "linear",
        lambda x, weight, bias=None: (read.append(weight), linear(x, weight, bias))[1],
    )

    output(model, x)

    merged, _ = layer.adapters["lora"].merged(layer.weight, None)
    assert any(weight.shape == merged.shape and torch.equal(weight, merged) for weight in read)
    assert not any(weight is layer._parameters["weight"] for weight in read)
    assert inside[0] is layer._parameters["weight"]
    assert after[0] is layer._parameters["weight"]
    assert "weight" not in vars(layer)


@pytest.mark.parametrize(
    ("family", "method"),
    [("beit", "lora+ssf"), ("vit", "svdiff+adaptformer"), ("multihead_attention", "lora")],
)
def test_a_forward_that_raises_leaves_no_weight_and_no_kept_input_behind(family, method):
    model, x = make(family), example(family)
    randomise_adapters(medpeft.apply(model, method))
    expected = output(model, x)
    inner = [m for m in model.modules() if isinstance(m, nn.Linear)]

    def fail(*_):
        raise RuntimeError("out of memory")

    for layer in inner:
        handle = layer.register_forward_pre_hook(fail)
        handovers = [m.handover for m in model.modules() if hasattr(m, "handover")]
        try:
            output(model, x)
        except RuntimeError as error:
            assert str(error) == "out of memory"  # noqa: PT017 - a layer that is only read does not raise
        handle.remove()
        assert not any(handover._frames for handover in handovers)
        assert not any({"weight", "in_proj_weight"} & vars(m).keys() for m in model.modules())
        assert torch.equal(output(model, x), expected)


def test_an_output_that_is_a_tuple_keeps_its_other_elements():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), "more"

    model, x = nn.Sequential(Pair(3, 4)).double(), torch.randn(2, 3, dtype=torch.float64)
    base, _ = model(x)
    medpeft.apply(model, "ssf", head=None)
    randomise_adapters(model)
    adapted, more = model(x)

    assert more == "more"
    assert not torch.equal(adapted, base)


def test_the_users_own_hooks_see_the_adapted_output_and_stay():
    model, x = make("vit"), example("vit")
    seen = []
    handle = model.blocks[0].mlp.fc1.register_forward_hook(lambda layer, args, y: seen.append(y.clone()))
    output(model, x)
    medpeft.apply(model, "ssf")
    randomise_adapters(model)
    output(model, x)
    medpeft.remove(model)
    output(model, x)
    handle.remove()

    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert hooks(model) == []


def test_an_inplace_operation_after_a_layer_is_handled():
    model = randomise(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)).double())
    x = torch.randn(3, 4, dtype=torch.float64)
    medpeft.apply(model, "ssf+lora", head=None, target=nn.Linear)
    randomise_adapters(model)
    model(x).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model[1] = nn.ReLU()
    model(x).sum().backward()

    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-10, atol=1e-12)


def test_an_input_that_wants_a_gradient_gets_the_one_of_the_merged_model():
    for method in ("lora", "ssf", "svdiff", "tsa"):
        family = "resnet" if method == "tsa" else "vit"
        model = randomise_adapters(medpeft.apply(make(family), method)).eval()
        x = example(family).requires_grad_()
        (adapted,) = torch.autograd.grad(output(model, x).sin().sum(), x)
        with medpeft.merged(model):
            (merged,) = torch.autograd.grad(output(model, x).sin().sum(), x)
        torch.testing.assert_close(adapted, merged, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("vit", "lora+ssf"),
        ("resnet", "lora"),
        ("resnet", "tsa+ssf"),
        ("vit", "svdiff"),
        ("vit", "adaptformer"),
    ],
)
def test_gradients_are_those_of_finite_differences(family, method):
    model = randomise_adapters(medpeft.apply(make(family), method)).eval()
    x = example(family)
    trainable = [p for n, p in model.named_parameters() if p.requires_grad and ".adapters." in n]

    def loss():
        return output(model, x).sin().sum()

    gradients = torch.autograd.grad(loss(), trainable)
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trainable]
    slope = sum((g * d).sum() for g, d in zip(gradients, along, strict=True))
    with torch.no_grad():
        values = []
        for step in (1e-6, -2e-6):
            for p, d in zip(trainable, along, strict=True):
                p.add_(d, alpha=step)
            values.append(loss())
    assert torch.isclose((values[0] - values[1]) / 2e-6, slope, rtol=1e-5)
