"""MiSS against its formula and against peft."""

import numpy as np
import peft
import pytest
import torch
from block_oracles import adapted_vit, assert_same, drawn, merged_weights
from torch import nn

import medpeft


@pytest.mark.parametrize("rank", [4, 5])
def test_miss_adds_one_matrix_side_by_side(rank):
    model, base = adapted_vit("miss", rank=rank)
    for name in ("attn.qkv", "attn.proj"):
        adapter = model.blocks[0].get_submodule(name).adapters.miss
        inputs = base[f"{name}.weight"].shape[1]
        repeated = np.tile(adapter.matrix.detach().numpy(), inputs)[:, :inputs]
        assert_same(merged_weights(model)[f"blocks.0.{name}.weight"], base[f"{name}.weight"] + repeated)


@pytest.mark.parametrize("rank", [4, 5])
def test_a_linear_layer_equals_pefts(rank):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 2)).double()

    theirs = peft.get_peft_model(make(), peft.MissConfig(r=rank, target_modules=["0"])).double()
    net = medpeft.apply(make(), "miss", rank=rank, target="0", head="1")
    with torch.no_grad():
        net[0].adapters.miss.matrix.copy_(drawn(16, rank))
        theirs.base_model.model[0].miss_block["default"].copy_(drawn(16, rank).mT)
    x = drawn(3, 12)
    assert torch.allclose(net(x), theirs(x), rtol=1e-12)
