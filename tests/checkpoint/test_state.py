"""State in memory is what a file would hold, and goes back whole or not at all."""

import io

import numpy as np
import pytest
import torch
from checkpoints import trained
from every_method import CASES, adapted, perturb
from golden.model import Golden
from models import make
from safetensors.torch import load_file
from torch import nn

import medpeft


def output(model, x):
    with torch.no_grad():
        result = model(x)
    for name in ("logits", "last_hidden_state"):
        result = getattr(result, name, result)
    return result


@pytest.mark.parametrize("case", CASES)
def test_state_is_what_a_file_holds_and_brings_the_model_back(case, tmp_path):
    model, x = adapted(case)
    medpeft.save(model, tmp_path / "a.safetensors")
    held, state = load_file(tmp_path / "a.safetensors"), medpeft.state(model)
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], state[name]) for name in held)
    before = output(model, x)
    perturb(model)
    parameters = list(model.parameters())
    medpeft.load_state(model, state)
    assert torch.equal(output(model, x), before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.fixture
def model():
    return trained(Golden(), "lora+bias")


def test_state_shares_no_memory_with_the_model(model):
    state = medpeft.state(model)
    kept = {name: tensor.clone() for name, tensor in state.items()}
    perturb(model)
    assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_arrays_go_out_and_come_back(model):
    state = medpeft.state(model, numpy=True)
    assert all(isinstance(value, np.ndarray) for value in state.values())
    perturb(model)
    medpeft.load_state(model, state)
    assert all(np.array_equal(value, state[name]) for name, value in medpeft.state(model, numpy=True).items())


def test_arrays_of_batchnorm_that_adapts_come_back_with_the_number_of_batches():
    model = medpeft.apply(
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "bias", batchnorm="adapt", head=None
    )
    model(torch.randn(5, 3))
    arrays = medpeft.state(model, numpy=True)
    model(torch.randn(5, 3))
    medpeft.load_state(model, arrays)
    assert model[1].num_batches_tracked.shape == ()
    assert model[1].num_batches_tracked == 1


def test_bfloat16_goes_out_as_float32_and_comes_back_bit_for_bit():
    model = medpeft.apply(make("vit").float(), "lora", rank=2, dtype=torch.bfloat16)
    perturb(model)
    before, arrays = medpeft.state(model), medpeft.state(model, numpy=True)
    name = next(name for name in before if ".adapters." in name)
    assert arrays[name].dtype == np.float32
    perturb(model)
    medpeft.load_state(model, arrays)
    after = medpeft.state(model)
    assert after[name].dtype == torch.bfloat16
    assert torch.equal(after[name], before[name])


def test_an_average_of_two_states_is_loaded(model):
    first = medpeft.state(model)
    perturb(model)
    second = medpeft.state(model)
    average = {name: (first[name] + second[name]) / 2 for name in first}
    medpeft.load_state(model, average)
    for name, value in medpeft.state(model).items():
        assert torch.allclose(value, average[name])


def changed(state, change):
    name = next(iter(state))
    if change == "lacks":
        state.pop(name)
    elif change == "has":
        state["stranger"] = torch.zeros(2)
    elif change == "shape":
        state[name] = state[name][:1]
    elif change == "nan":
        state[name] = torch.full_like(state[name], float("nan"))
    elif change == "overflow":
        state[name] = torch.full(state[name].shape, 1e200, dtype=torch.float64)
    elif change == "integers":
        state[name] = state[name].to(torch.int64)
    elif change == "text":
        state[name] = "1.0"
    else:
        state[name] = np.full(state[name].shape, "a")
    return state


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("lacks", "it lacks"),
        ("has", "it has 'stranger', which the model has not"),
        ("shape", "in the state, and"),
        ("nan", "not finite"),
        ("overflow", "not finite"),
        ("integers", "is torch.int64 in the state"),
        ("text", "must be a tensor or an array"),
        ("letters", "no array of numbers"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change, words):
    model = trained(Golden().float(), "lora+bias")
    before = medpeft.state(model)
    with pytest.raises(medpeft.CheckpointError, match=words):
        medpeft.load_state(model, changed(medpeft.state(model), change))
    after = medpeft.state(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("state", [None, [1], {1: torch.zeros(1)}, "a"])
def test_what_is_no_state_is_refused(model, state):
    with pytest.raises(medpeft.CheckpointError, match=r"must be a dict of tensors by name"):
        medpeft.load_state(model, state)


def test_a_model_that_is_not_as_it_was_trained_has_no_state(model):
    with pytest.raises(medpeft.MedpeftError):
        medpeft.state(Golden())
    with medpeft.disabled(model), pytest.raises(medpeft.CheckpointError, match="leave it first"):
        medpeft.state(model)
    state = medpeft.state(model)
    with medpeft.merged(model), pytest.raises(medpeft.CheckpointError, match="leave it first"):
        medpeft.load_state(model, state)


def test_a_file_in_memory_is_that_on_the_disk(model, tmp_path):
    buffer = io.BytesIO()
    medpeft.save(model, buffer, metadata={"classes": ["a", "b"]})
    medpeft.save(model, tmp_path / "a.safetensors", metadata={"classes": ["a", "b"]})
    assert buffer.getvalue() == (tmp_path / "a.safetensors").read_bytes()
    again = medpeft.load(Golden(), buffer)
    assert all(
        torch.equal(a, b)
        for a, b in zip(medpeft.state(again).values(), medpeft.state(model).values(), strict=True)
    )
    assert medpeft.inspect(buffer).classes == ["a", "b"]
    with (tmp_path / "a.safetensors").open("rb") as opened:
        assert medpeft.inspect(opened).classes == ["a", "b"]


def test_an_open_file_that_cannot_be_used_is_told(model, tmp_path):
    with pytest.raises(medpeft.CheckpointError, match="open for bytes"):
        medpeft.save(model, io.StringIO())
    with (tmp_path / "b").open("wb") as opened:
        medpeft.save(model, opened)
        with pytest.raises(medpeft.CheckpointError, match="mode 'rb'"):
            medpeft.inspect(opened)
    closed = io.BytesIO()
    closed.close()
    for call in (medpeft.save, medpeft.load):
        with pytest.raises(medpeft.CheckpointError, match="open file"):
            call(model, closed)
