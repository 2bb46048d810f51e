"""Weights that cannot be merged: tied, not writable, not finite, of integers. The model stays as it is."""

import pytest
import torch
from models import randomise, randomise_adapters
from torch import nn

import medpeft


def test_a_weight_that_is_tied_to_another_layer_is_not_merged():
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "out": nn.Linear(4, 6, bias=False)})
    model["out"].weight = model["embed"].weight
    medpeft.apply(model, "lora", head=None, target="out")
    randomise_adapters(model)

    with pytest.raises(
        medpeft.MedpeftError, match=r"out: its weight is tied to embed\.weight, which has no such adapter"
    ):
        medpeft.merge(model)
    assert model["out"].weight is model["embed"].weight


def test_a_layer_under_two_names_merges_once():
    shared = nn.Linear(4, 4)
    model = randomise(nn.Sequential(shared, nn.ReLU(), shared).double())
    x = torch.randn(2, 4, dtype=torch.float64)
    adapted = randomise_adapters(medpeft.apply(model, "ssf", head=None))(x)

    medpeft.merge(model)

    torch.testing.assert_close(model(x), adapted)
    assert model[0] is model[2]


def trained_stack(second=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    medpeft.apply(model, "lora", target="linear", head="2")
    if second is not None:
        model[1].weight = second
    with torch.no_grad():
        for layer in model[:2]:
            layer.adapters.lora.up.normal_()
    return model


def made_in_inference_mode():
    with torch.inference_mode():
        return torch.randn(8, 8)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (lambda: nn.Parameter(torch.randn(8, 1).expand(8, 8)), "1: its weight is an expanded view"),
        (lambda: nn.Parameter(made_in_inference_mode(), False), "1: its weight was made under torch.inf"),
    ],
)
def test_a_weight_that_cannot_be_written_is_refused_before_anything_is(second, message):
    model, x = trained_stack(second()), torch.randn(3, 8)
    with torch.no_grad():
        before = model(x)
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.merge(model)
    with torch.no_grad():
        assert torch.equal(model(x), before)


def test_a_failure_in_the_middle_of_writing_undoes_all(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 2))
    medpeft.apply(model, "ssf", head="2", init="official", target="linear")
    x, state = torch.randn(3, 8), {n: t.clone() for n, t in model.state_dict().items()}
    before = model(x)
    last = model[1].bias
    copy_ = torch.Tensor.copy_

    def fails_at_the_last(self, *args, **kwargs):
        if self is last and not torch.equal(args[0], state["1.bias"]):
            raise MemoryError
        return copy_(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", fails_at_the_last)
    with pytest.raises(MemoryError):
        medpeft.merge(model)
    assert model[0].bias is None
    assert torch.equal(model(x), before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_two_parameters_over_one_storage_are_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[1].weight = nn.Parameter(model[0].weight.data)
    medpeft.apply(model, "lora", target="0", head="2")
    with pytest.raises(medpeft.MedpeftError, match=r"0: its weight is tied to 1\.weight"):
        medpeft.merge(model, example_input=torch.randn(3, 8))


def test_parameters_side_by_side_in_one_storage_are_not_tied():
    flat = torch.randn(2, 8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model[0].weight, model[1].weight = nn.Parameter(flat[0]), nn.Parameter(flat[1])
    medpeft.apply(model, "lora", target="0", head="2")
    medpeft.merge(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_merged_weight_that_is_not_finite_is_refused(value):
    model = trained_stack()
    with torch.no_grad():
        model[1].adapters.lora.up[0, 0] = value
    with pytest.raises(medpeft.MedpeftError, match="1: its merged weight would hold NaN or infinite"):
        medpeft.merge(model)
    assert torch.isfinite(model[1].weight).all()


def test_a_weight_of_integers_is_refused_in_words():
    model = trained_stack()
    model[1].weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(medpeft.MedpeftError, match="1: its weight is quantised or of integers"):
        medpeft.merge(model)
