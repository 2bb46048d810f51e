"""The models that tests are made of: new ones each time, and equal."""

import torch
from models import FAMILIES, make
from mold import Mold
from torch import nn
from traces import same, tensors


def memories(model):
    every = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in every if tensor.numel()}


def test_models_of_a_family_are_equal_and_share_no_memory():
    for family in FAMILIES:
        first, second = make(family), make(family)
        assert same(tensors(first), tensors(second)), family
        assert not memories(first) & memories(second), family
        assert not any(module.training for module in first.modules()), family


def test_a_cast_keeps_what_is_tied_what_is_frozen_and_what_is_in_between():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)).eval()
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model.register_buffer("turned", torch.randn(3, 2).T)
    mold = Mold(model)
    cast, other = mold.cast(), mold.cast()

    assert cast[2].weight is cast[0].weight
    assert isinstance(cast[0].weight, nn.Parameter)
    assert [p.requires_grad for p in cast.parameters()] == [p.requires_grad for p in model.parameters()]
    assert cast.turned.stride() == model.turned.stride()
    assert same(tensors(cast), tensors(model))
    assert not memories(cast) & (memories(model) | memories(other))
    assert not any(module.training for module in cast.modules())
