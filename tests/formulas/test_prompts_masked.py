"""Prompts beside masks, known by their names or shapes, and where the batch comes second."""

import copy

import pytest
import torch
from layer_oracles import drawn
from models import randomise, randomise_adapters
from prompted import put_in, taken_off
from torch import nn

import medpeft


class Masked(nn.Module):
    """A transformer block that hands its mask to torch's attention as it is."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x, attn_mask=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=attn_mask)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("of", ["numbers", "truth values"])
def test_deep_prompts_are_seen_through_a_mask_and_keep_it_causal(of):
    model, x = nn.ModuleDict({"block": randomise(Masked().double())}).eval(), drawn(2, 5, 16)
    block = model["block"]
    plain = copy.deepcopy(block)
    randomise_adapters(medpeft.apply(model, "vpt_deep", head=None, tokens=3))
    prompts = block.adapters["vpt_deep"].prompts.tokens.detach()
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wide = torch.zeros(8, 8, dtype=torch.bool)
    wide[3:, 3:] = hidden
    as_given = (
        (lambda m: m)
        if of == "truth values"
        else (lambda m: torch.zeros(m.shape).double().masked_fill(m, -torch.inf))
    )

    with torch.no_grad():
        got = block(x, attn_mask=as_given(hidden))
        expected = taken_off(plain(put_in(x, prompts, 0), attn_mask=as_given(wide)), prompts, 0)
        later = block(torch.cat([x[:, :4], drawn(2, 1, 16, seed=8)], 1), attn_mask=as_given(hidden))

    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(later[:, :4], got[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.equal(later[:, 4], got[:, 4])


def test_a_mask_without_a_name_is_known_by_its_shape():
    class Unnamed(Masked):
        def forward(self, x, *rest):
            return super().forward(x, *rest)

    named, unnamed = (nn.ModuleDict({"block": randomise(cls().double())}).eval() for cls in (Masked, Unnamed))
    for model in (named, unnamed):
        randomise_adapters(medpeft.apply(model, "vpt_deep", head=None, tokens=3))
    x, hidden = drawn(2, 5, 16), torch.ones(5, 5, dtype=torch.bool).triu(1)

    assert torch.equal(unnamed["block"](x, hidden), named["block"](x, attn_mask=hidden))


def test_the_batch_may_come_second():
    from open_clip.transformer import Transformer

    first, second = (randomise(Transformer(16, 2, 2, batch_first=b).double()).eval() for b in (True, False))
    for model in (first, second):
        methods = {
            "vpt_deep": {},
            "vpt_shallow": {"tokens": 6},
            "convpass": {"target": "*.mlp"},
            "prefix": {},
        }
        randomise_adapters(medpeft.apply(model, methods, head=None))

    x = drawn(2, 9, 16)
    torch.testing.assert_close(first(x), second(x), rtol=1e-12, atol=1e-12)
