"""Forwards that someone else puts on a layer: a user, accelerate, the replicas of DataParallel."""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from every_method import CASES, adapted, perturb
from models import make, output, randomise
from replicas import replicas_of
from torch import nn

import medpeft


def remembering(layer):
    """A forward that keeps what it returned, as for features that are computed once."""
    own, kept = layer.forward, {}

    def forward(x):
        if x not in kept:
            kept[x] = own(x)
        return kept[x]

    return forward


@pytest.mark.parametrize("method", ["ssf", "lora", "tsa", "conv_adapter"])
def test_nothing_is_written_into_what_a_replaced_forward_returns(method):
    for early in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 2))
        if early:
            model[0].forward = replaced = remembering(model[0])
        medpeft.apply(model, method, head="2", target="0")
        perturb(model, size=0.5)
        if not early:
            model[0].forward = replaced = remembering(model[0])
        x = torch.randn(2, 4, 3, 3)
        with torch.no_grad():
            first = model(x).clone()
            assert torch.equal(model(x), first)
        medpeft.remove(model)
        assert model[0].forward is replaced


@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize("target", ["*", "0"])
def test_a_forward_that_is_wrapped_while_adapted_is_not_adapted_twice_later(method, target):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 2)) if target == "0" else layer
    never_wrapped, x = copy.deepcopy(model), torch.randn(3, 4)
    medpeft.apply(model, method, target=target, head=None)
    layer.forward = wrapper = remembering(layer)
    medpeft.remove(model)
    assert layer.forward is wrapper
    for other in (model, never_wrapped):
        medpeft.apply(other, method, target=target, head=None)
        perturb(other, size=0.5)
    torch.testing.assert_close(model(x), never_wrapped(x), rtol=1e-6, atol=1e-6)


def test_a_weight_that_a_closure_may_hold_is_refused_with_the_reason():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(36, 2))
    model[0].forward = remembering(model[0])
    with pytest.raises(
        medpeft.MedpeftError, match="forward of 0 was replaced by a function of its own, and 'svdiff' changes"
    ):
        medpeft.apply(model, "svdiff", head="2")
    assert "adapters" not in model[0]._modules


def spelled_out(layer, x):
    return x @ layer.weight.t() + layer.bias


@pytest.mark.parametrize("method", ["svdiff", "ssf", "lora"])
@pytest.mark.parametrize(
    "bind", [types.MethodType, lambda f, layer: functools.partial(f, layer)], ids=["method", "partial"]
)
def test_a_replaced_forward_that_is_bound_to_its_layer_meets_the_adapted_weight(method, bind):
    model, x = (
        randomise(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()),
        torch.randn(3, 4, dtype=torch.float64),
    )
    model[0].forward = bind(spelled_out, model[0])
    base = model(x)
    perturb(
        medpeft.apply(model, method, target="0", head="1", **({"dora": True} if method == "lora" else {}))
    )
    y = model(x)
    with medpeft.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    twins = [copy.deepcopy(model)]
    if bind is not types.MethodType:  # Such a method is pickled by name.
        twins.append(pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(x), y)
    medpeft.remove(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("method", ["ssf", "lora", "svdiff"])
@pytest.mark.parametrize("early", [True, False])
def test_accelerates_hooks_are_added_and_taken_off_at_any_time(method, early):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model, x = make("vit"), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    base = model(x)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm))]
    if early:
        for layer in layers:
            add_hook_to_module(layer, ModelHook())
    perturb(medpeft.apply(model, method))
    expected = model(x)
    if not early:
        for layer in layers:
            add_hook_to_module(layer, ModelHook())
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    for layer in layers:
        remove_hook_from_module(layer)
    assert torch.equal(model(x), expected)
    medpeft.remove(model)
    assert torch.equal(model(x), base)
    assert not any(
        "forward" in vars(layer) and isinstance(layer.forward, functools.partial) for layer in layers
    )


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("full", "linear_probe")])
def test_replicas_of_dataparallel_compute_with_their_own_tensors(case):
    model, x = adapted(case)
    expected = output(model, x)
    replicas = replicas_of(model)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor
    for replica in replicas:
        torch.testing.assert_close(output(replica, x), expected, rtol=1e-12, atol=1e-12)


def test_a_replica_keeps_the_dtype_of_a_weight_that_its_parent_reads():
    attention = randomise(nn.MultiheadAttention(8, 2)).bfloat16()
    medpeft.apply(attention, "lora", target="out_proj", head=None)
    perturb(attention)
    x = torch.randn(3, 1, 8, dtype=torch.bfloat16)
    expected = attention(x, x, x)[0]
    for replica in replicas_of(attention):
        assert torch.equal(replica(x, x, x)[0], expected)


@pytest.mark.parametrize("method", ["lora", "oft", "ssf"])
def test_a_call_without_input_fails_as_on_the_plain_layer(method):
    layer = medpeft.apply(make("vit"), method, target="blocks.0.mlp.fc1").blocks[0].mlp.fc1
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        layer()


def test_the_model_keeps_the_signature_of_its_forward():
    model = make("hf_vit")
    before = list(inspect.signature(model.forward).parameters)
    medpeft.apply(model, "lora")
    assert list(inspect.signature(model.forward).parameters) == before
    assert list(inspect.signature(pickle.loads(pickle.dumps(model)).forward).parameters) == before
