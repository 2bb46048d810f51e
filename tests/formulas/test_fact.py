"""FacT against its formula, written out in NumPy and float64."""

import numpy as np
import pytest
import timm
import torch
from block_oracles import (
    WIDTH,
    adapted_vit,
    alone,
    assert_same,
    block,
    drawn,
    input_for,
    merged_weights,
    weights,
)
from models import make
from torch import nn

import medpeft


@pytest.mark.parametrize("form", ["tt", "tucker"])
def test_fact_is_one_tensor_for_all_weights_of_all_layers(form):
    model, base = adapted_vit("fact", rank=3, scale=0.5, form=form)
    layers = [getattr(model.blocks[i], a).get_submodule(b) for i in (0, 1) for a, b in _LAYERS]
    adapters = [layer.adapters.fact for layer in layers]
    u, v = (getattr(adapters[0].factors, name).detach().numpy() for name in "uv")
    sigma = np.concatenate([adapter.sigma.detach().numpy() for adapter in adapters])
    assert len(sigma) == 12 * 2

    if form == "tucker":
        core = adapters[0].factors.core.detach().numpy()
        change = np.einsum("nj,jkl,ok,il->noi", sigma, core, v, u)
    else:
        change = np.einsum("nkl,ok,il->noi", sigma, v, u)
    merged = merged_weights(model)
    start = 0
    for name, blocks, axis in (("attn.qkv", 3, 0), ("attn.proj", 1, 0), ("mlp.fc1", 4, 0), ("mlp.fc2", 4, 1)):
        stacked = np.concatenate(change[start : start + blocks], axis)
        assert_same(merged[f"blocks.0.{name}.weight"], base[f"{name}.weight"] + 0.5 * stacked)
        start += blocks
    x = drawn(2, 5, WIDTH)
    first = {name.removeprefix("blocks.0."): p for name, p in merged.items() if name.startswith("blocks.0.")}
    assert_same(model.blocks[0](x), block(x.numpy(), first))


_LAYERS = (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2"))


def test_fact_starts_as_wide_as_in_its_authors_code():
    with_vit = medpeft.apply(timm.create_model("vit_tiny_patch16_224", depth=2), "fact", rank=16)
    tucker = medpeft.apply(timm.create_model("vit_tiny_patch16_224", depth=2), "fact", rank=16, form="tucker")

    bounds = {name: largest(with_vit, name) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    for name, inputs in (("attn.qkv", 16), ("attn.proj", 16), ("mlp.fc1", 16), ("mlp.fc2", 4 * 16)):
        assert 0.9 * inputs**-0.5 < bounds[name] <= inputs**-0.5
    # One matrix of 16 × 24: twelve blocks in each of the two layers.
    drawn_p = torch.cat([p.flatten() for name, p in tucker.named_parameters() if name.endswith("fact.sigma")])
    assert drawn_p.numel() == 16 * 24
    assert 0.9 * (6 / 40) ** 0.5 < drawn_p.abs().max() <= (6 / 40) ** 0.5


def largest(model, name):
    return float(model.blocks[0].get_submodule(name).adapters.fact.sigma.detach().abs().max())


@pytest.mark.parametrize("form", ["tt", "tucker"])
@pytest.mark.parametrize("shape", [(8, 4), (4, 8)])
def test_fact_drops_between_sigma_and_v(form, shape):
    outputs, inputs = shape
    model, _ = alone(nn.Linear(inputs, outputs), "fact", rank=2, form=form, dropout=0.5)
    x, adapter = input_for(model[0]), model[0].adapters.fact
    torch.manual_seed(0)
    y = model.train()(x)

    hidden = x.unflatten(-1, (-1, 4)) @ adapter.factors.u  # (3, 1 or 2, r)
    sigma = adapter._middle()
    if outputs > inputs:
        through = torch.einsum("bl,nkl->bnk", hidden[:, 0], sigma).flatten(1)
    else:
        through = torch.einsum("bnl,nkl->bk", hidden, sigma)
    torch.manual_seed(0)
    dropped = torch.nn.functional.dropout(through, 0.5).unflatten(-1, (-1, 2))
    expected = (
        model[0].weight @ x.mT + model[0].bias[:, None] + (dropped @ adapter.factors.v.mT).flatten(1).mT
    )

    torch.testing.assert_close(y, expected.mT, rtol=0, atol=1e-12)
    model.eval()
    assert torch.equal(model(x), model(x))


def test_fact_refuses_dropout_where_it_changes_the_weight():
    with pytest.raises(
        medpeft.MedpeftError, match=r"dropout=0\.1 cannot act at .*, where FacT changes the weight"
    ):
        medpeft.apply(make("multihead_attention"), "fact", dropout=0.1, head=None)
    with pytest.raises(medpeft.MedpeftError, match=r"dropout=1\.5 must be at least 0 and below 1"):
        medpeft.apply(make("vit"), "fact", dropout=1.5)


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_fact_cuts_off_what_juts_out_of_a_weight(shape):
    outputs, inputs = shape
    layer = nn.Linear(inputs, outputs)
    model, values = alone(layer, "fact", rank=2)
    x, small = input_for(layer), min(shape)
    blocks = np.einsum("nkl,ok,il->noi", values["sigma"], values["v"], values["u"])

    assert len(blocks) == -(-max(shape) // small)
    change = np.concatenate(list(blocks), 0 if outputs > inputs else 1)[:outputs, :inputs]
    weight, bias = weights(model[0])
    assert_same(model(x), x.numpy() @ (weight + change).T + bias)


def test_fact_adapts_attentions_and_mlps_but_not_the_mlps_that_make_positions():
    model = make("maxvit")
    sites = {site.name for _, site in medpeft.plan(model, "fact").sites}

    layers = {
        name
        for name, _ in model.named_modules()
        if name.endswith(("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))
    }
    positions = {name for name in layers if ".rel_pos." in name}
    assert positions
    assert sites == layers - positions
