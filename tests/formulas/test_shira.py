"""SHiRA: its numbers are added at their places, which are chosen as asked, and are as many as LoRA's."""

import pytest
import torch
from block_oracles import adapted_vit, assert_same, merged_weights
from models import make
from torch import nn

import medpeft


def test_shira_adds_its_numbers_at_their_places():
    model, base = adapted_vit("shira", rank=1)
    for name in ("attn.qkv", "attn.proj"):
        adapter = model.blocks[0].get_submodule(name).adapters.shira
        expected = base[f"{name}.weight"].copy()
        for place, value in zip(adapter.places.tolist(), adapter.values.tolist(), strict=True):
            expected[place // expected.shape[1], place % expected.shape[1]] += value
        assert len(set(adapter.places.tolist())) == sum(expected.shape)
        assert_same(merged_weights(model)[f"blocks.0.{name}.weight"], expected)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))


def applied(model, **options):
    return medpeft.apply(model, "shira", target="0", head="2", **options)[0].adapters.shira


def test_the_largest_weights_are_taken():
    model = net()
    weight = model[0].weight.detach().clone().flatten().abs()
    adapter = applied(model, rank=2, mask="magnitude")
    assert len(adapter.places) == 2 * 30
    others = torch.ones(200, dtype=torch.bool).index_fill(0, adapter.places, False)
    assert weight[adapter.places].min() >= weight[others].max()


def test_the_largest_gradients_are_taken_of_each_output():
    model = net()
    model(torch.randn(5, 10)).square().sum().backward()
    gradient = model[0].weight.grad.clone()
    adapter = applied(model, rank=2, mask="gradient", each_output=True)
    # 60 places for 20 outputs
    expected = gradient.abs().topk(3, 1).indices + 10 * torch.arange(20)[:, None]
    assert set(adapter.places.tolist()) == set(expected.flatten().tolist())
    assert model[0].weight.grad is None


def test_without_a_gradient_it_is_asked_for():
    model = net()
    with pytest.raises(medpeft.MedpeftError, match=r"needs the gradient of 0\.weight.*run backward"):
        applied(model, mask="gradient")
    assert not hasattr(model[0], "adapters")


def test_a_file_brings_its_places(tmp_path):
    model = net()
    model(torch.randn(5, 10)).square().sum().backward()
    adapter = applied(model, rank=1, mask="gradient")
    with torch.no_grad():
        adapter.values.normal_()
    medpeft.save(model, tmp_path / "a.safetensors")
    again = medpeft.load(net(), tmp_path / "a.safetensors")
    x = torch.randn(3, 10)
    assert torch.equal(again[0].adapters.shira.places, adapter.places)
    assert torch.equal(again(x), model(x))


def test_no_more_places_than_there_are_are_taken():
    assert sorted(applied(net(), rank=1000).places.tolist()) == list(range(200))


def test_a_seed_draws_its_places_again():
    def places(seed):
        model = medpeft.apply(make("vit"), "shira", rank=1, seed=seed)
        return model.blocks[0].attn.qkv.adapters.shira.places

    assert torch.equal(places(1), places(1))
    assert not torch.equal(places(1), places(2))
