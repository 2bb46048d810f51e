"""Prefix tuning in every kind of attention, computed by hand in float64."""

import copy

import numpy as np
import pytest
import timm
import torch
from layer_oracles import drawn
from models import make, randomise, randomise_adapters
from prompted import SIZES, put_in, vit
from torch import nn

import medpeft


def test_the_prefix_stands_still_where_patches_are_rotated():
    model, x = (
        randomise(timm.create_model("vit_small_patch16_rope_224", **SIZES).double()).eval(),
        drawn(2, 17, 16),
    )
    attention, plain = model.blocks[0].attn, copy.deepcopy(model.blocks[0].attn)
    randomise_adapters(medpeft.apply(model, "prefix", tokens=3), size=0.5)
    rope = model.rope.get_embed(shape=(4, 4)).double()

    plain.num_prefix_tokens += 3
    keys, values = (p.unsqueeze(0).expand(2, -1, -1) for p in map(torch.from_numpy, prefix_of(attention)))
    extra = torch.cat([torch.zeros_like(keys), keys, values], -1)
    plain.qkv.register_forward_hook(lambda layer, args, y: torch.cat([y[:, :1], extra, y[:, 4:]], 1))
    with torch.no_grad():
        padded = plain(put_in(x, torch.zeros(3, 16, dtype=x.dtype), 1), rope=rope)
        expected = torch.cat([padded[:, :1], padded[:, 4:]], 1)
        got = attention(x, rope=rope)

    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def by_hand(q, k, v, keys, values, mask=None):
    """softmax(q·[P_k; k]ᵀ / √d)·[P_v; v] for heads (B, H, N, d), in NumPy; `mask` is added to the scores of the real keys."""
    keys, values = (np.broadcast_to(p, (len(q), *p.shape)) for p in (keys, values))
    scores = q @ np.swapaxes(np.concatenate([keys, k], 2), -1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores + np.concatenate([np.zeros((*mask.shape[:-1], keys.shape[2])), mask], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ np.concatenate([values, v], 2)


def heads(x, number):
    """(…, N, D) → (…, H, N, d)."""
    return np.moveaxis(x.reshape(*x.shape[:-1], number, -1), -2, -3)


def joined(x):
    return np.moveaxis(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def prefix_of(attention):
    (adapter,) = attention.adapters.children()
    return adapter.k.detach().numpy(), adapter.v.detach().numpy()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_prefix_in_a_fused_projection_whether_the_attention_is_fused_or_not(fused, normalised, masked):
    model, x = vit(qk_norm=normalised), drawn(2, 5, 16)
    attention = model.blocks[1].attn
    attention.fused_attn = fused
    plain = copy.deepcopy(attention)
    randomise_adapters(medpeft.apply(model, "prefix", tokens=3), size=0.5)
    keys, values = (heads(p, 2) for p in prefix_of(attention))
    mask = drawn(1, 1, 5, 5, seed=7) if masked else None

    with torch.no_grad():
        q, k, v = (heads(part.numpy(), 2) for part in plain.qkv(x).chunk(3, -1))
        if normalised:  # The prefix is normalised as every other key.
            q = plain.q_norm(torch.from_numpy(q)).numpy()
            k, keys = (plain.k_norm(torch.from_numpy(part)).numpy() for part in (k, keys))
        mixed = joined(by_hand(q, k, v, keys, values, None if mask is None else mask.numpy()))
        expected = plain.proj(torch.from_numpy(mixed)).numpy()
        got = attention(x, attn_mask=mask).numpy()

    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def test_prefix_in_separate_projections():
    model, x = make("hf_vit"), drawn(2, 5, 16)
    attention = model.vit.layers[0].attention
    plain = copy.deepcopy(attention)
    randomise_adapters(medpeft.apply(model, "prefix", tokens=3), size=0.5)
    keys, values = (heads(p, 2) for p in prefix_of(attention))

    with torch.no_grad():
        q, k, v = (heads(proj(x).numpy(), 2) for proj in (plain.q_proj, plain.k_proj, plain.v_proj))
        expected = plain.o_proj(torch.from_numpy(joined(by_hand(q, k, v, keys, values)))).numpy()
        got = attention(x)[0].numpy()

    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("masks", ["none", "attn_mask", "key_padding_mask", "is_causal"])
def test_prefix_in_torchs_own_attention_with_and_without_masks(masks):
    attention = randomise(nn.MultiheadAttention(8, 2, batch_first=True).double()).eval()
    model, x = nn.ModuleDict({"attn": attention}), drawn(2, 5, 8)
    q, k, v = (
        heads(part, 2)
        for part in np.split(
            (x @ attention.in_proj_weight.T + attention.in_proj_bias).detach().numpy(), 3, -1
        )
    )
    tokens = 3 if masks in ("none", "key_padding_mask") else 1
    randomise_adapters(medpeft.apply(model, "prefix", head=None, tokens=tokens), size=0.5)
    keys, values = (heads(p, 2) for p in prefix_of(attention))
    causal = torch.triu(torch.full((5, 5), -torch.inf, dtype=torch.float64), 1)
    padded = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = {
        "none": {},
        "attn_mask": {"attn_mask": causal},
        "key_padding_mask": {"key_padding_mask": padded},
        "is_causal": {"attn_mask": causal, "is_causal": True},
    }[masks]
    added = {
        "none": None,
        "key_padding_mask": torch.zeros(2, 1, 1, 5).masked_fill(padded[:, None, None], -torch.inf).numpy(),
    }

    with torch.no_grad():
        mask = added.get(masks, causal.numpy()[None, None])
        mask = None if mask is None else np.broadcast_to(mask, (2, 2, 5, 5))
        expected = attention.out_proj(torch.from_numpy(joined(by_hand(q, k, v, keys, values, mask)))).numpy()
        for need_weights in (True, False):
            got = attention(x, x, x, need_weights=need_weights, **given)[0].numpy()
            assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()
    assert attention.bias_k is None


def test_several_keys_beside_a_mask_of_torchs_own_attention_are_refused():
    model, x = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)}), torch.zeros(5, 2, 8)
    medpeft.apply(model, "prefix", head=None, tokens=2)

    with pytest.raises(
        medpeft.MedpeftError, match=r"adds 2 keys, and torch's attention \(attn\), given an attn_mask"
    ):
        model["attn"](x, x, x, attn_mask=torch.zeros(5, 5))


def test_prefix_leaves_attention_across_sequences_to_other_methods():
    planned = medpeft.plan(make("diffusion_unet"), "prefix", head=None)

    assert {site.name.rpartition(".")[2] for _, site in planned.sites} == {"attn1"}
    with pytest.raises(medpeft.MedpeftError, match="attn2 attends to tokens other than its own"):
        medpeft.plan(make("diffusion_unet"), "prefix", head=None, target="*.attn2")


def test_prefix_refuses_another_sequence_when_it_comes():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x, memory=None):
            kept = x if memory is None else memory
            return nn.functional.scaled_dot_product_attention(self.q(x), self.k(kept), self.v(kept))

    model = medpeft.apply(nn.ModuleDict({"attn": Attention()}), "prefix", head=None)
    x, memory = torch.zeros(2, 5, 8), torch.zeros(2, 40, 8)

    assert model["attn"](x).shape == x.shape
    for given in ((x, memory), (x,)):
        with pytest.raises(
            medpeft.MedpeftError, match=r"which is given others, \(2, 40, 8\).*, to attend to"
        ):
            model["attn"](*given, **({} if len(given) == 2 else {"memory": memory}))


def test_prefix_leaves_an_attention_with_a_key_of_its_own_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, add_bias_kv=True)})

    with pytest.raises(medpeft.MedpeftError, match=r"attn has a key and a value of its own \(add_bias_kv\)"):
        medpeft.apply(model, "prefix", head=None)
