"""Attentions that keep a table of their biases in eval mode compute with the values that are in the model."""

import copy

import pytest
import torch
from banks import file_of
from checkpoints import trained
from timm.models import efficientformer, levit, tiny_vit
from torch import nn

import medpeft

ATTENTIONS = {
    "LeViT": lambda: levit.Attention(dim=8, key_dim=4, num_heads=2, resolution=(2, 2)),
    "EfficientFormer": lambda: efficientformer.Attention(dim=8, key_dim=4, num_heads=2, resolution=2),
    "TinyViT": lambda: tiny_vit.Attention(dim=8, key_dim=4, num_heads=2, resolution=(2, 2)),
}


class Attending(nn.Module):
    """One attention among four tokens, and a head."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.attn, self.head = ATTENTIONS[name](), nn.Linear(8, 2)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d):  # One starts at 0, and the attention is without effect.
                nn.init.ones_(module.weight)

    def forward(self, x):
        return self.head(self.attn(x).mean(1))


def of_site(name, seed, x):
    """A model that has trained its biases by much, which has run in eval mode, and its output."""
    model = trained(Attending(name), "attention", seed=seed, head="head")
    model.attn.attention_biases.mul_(20)
    return model, model(x)


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_a_table_of_biases_is_that_of_the_values_in_the_model(name):
    x, base = torch.randn(3, 4, 8), Attending(name).eval()
    plain = base(x)
    model, right = of_site(name, 1, x)
    with medpeft.disabled(model):
        assert torch.equal(model(x), plain)
        with medpeft.scaled(model, 0.5):
            assert not torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
    assert torch.equal(model(x), right)
    loaded = copy.deepcopy(base)
    assert torch.equal(medpeft.load(loaded, file_of(model))(x), right)
    assert torch.equal(medpeft.remove(loaded)(x), plain)
    found = medpeft.attribute(model, lambda network: float(network(x).sum()))
    assert found.base == float(model.head(base.attn(x).mean(1)).sum())


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_a_bank_shares_no_table_of_biases(name):
    x, base = torch.randn(3, 4, 8), Attending(name).eval()
    plain, made, bank = base(x), {}, medpeft.Bank(base)
    for seed in range(2):
        model, made[str(seed)] = of_site(name, seed, x)
        bank.add(str(seed), file_of(model))
    mixed = bank(x, ["0", None, "1"])
    for row, right in zip(mixed, (made["0"][0], plain[1], made["1"][2]), strict=True):
        torch.testing.assert_close(row, right)
    for use in ("0", "1", None, "1"):
        bank.use(use)
        assert torch.equal(base(x), plain if use is None else made[use])
