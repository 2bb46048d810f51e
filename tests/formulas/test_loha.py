"""LoHa against its formula in NumPy and against peft."""

import numpy as np
import peft
import pytest
import torch
from block_oracles import WIDTH, adapted_vit, assert_same, block, drawn, merged_weights
from torch import nn

import medpeft


def test_loha_adds_the_product_of_two_low_rank_matrices():
    model, base = adapted_vit("loha", rank=3, alpha=6.0)
    adapter = model.blocks[0].attn.qkv.adapters.loha
    B1, A1, B2, A2 = (
        getattr(adapter, name).detach().numpy() for name in ("up_1", "down_1", "up_2", "down_2")
    )
    changed = {}
    for name in ("attn.qkv", "attn.proj"):
        adapter = model.blocks[0].get_submodule(name).adapters.loha
        B1, A1, B2, A2 = (
            getattr(adapter, part).detach().numpy() for part in ("up_1", "down_1", "up_2", "down_2")
        )
        changed[f"{name}.weight"] = base[f"{name}.weight"] + 2.0 * (B1 @ A1) * (B2 @ A2)
        assert_same(merged_weights(model)[f"blocks.0.{name}.weight"], changed[f"{name}.weight"])
    x = drawn(2, 5, WIDTH)
    assert_same(model.blocks[0](x), block(x.numpy(), {**base, **changed}))


def test_its_rank_is_that_of_the_product():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 32, dtype=torch.double), nn.Linear(32, 2, dtype=torch.double))
    base = layer[0].weight.detach().clone()
    medpeft.apply(layer, "loha", rank=3, target="0", head="1")
    with torch.no_grad():
        for parameter in layer[0].adapters.loha.parameters():
            parameter.normal_()
    medpeft.merge(layer)
    assert torch.linalg.matrix_rank(layer[0].weight - base) == 9


@pytest.mark.parametrize("tucker", [False, True])
def test_a_convolution_equals_pefts(tucker):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 2, 1)).double()
    x = torch.randn(2, 6, 5, 5, dtype=torch.double)
    config = peft.LoHaConfig(
        r=3, alpha=6, target_modules=["0"], init_weights=False, use_effective_conv2d=tucker
    )
    theirs = peft.get_peft_model(
        nn.Sequential(*(nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 2, 1))).double(), config
    )
    theirs.base_model.model[0].base_layer.load_state_dict(net[0].state_dict())
    theirs.base_model.model[1].load_state_dict(net[1].state_dict())
    medpeft.apply(net, "loha", rank=3, alpha=6.0, tucker=tucker, target="0", head="1")
    ours, layer = net[0].adapters.loha, theirs.base_model.model[0]
    with torch.no_grad():
        for number in (1, 2):
            up, down = (getattr(layer, f"hada_w{number}_{part}")["default"].double() for part in "ab")
            # peft keeps B on its side where there is a core.
            getattr(ours, f"up_{number}").copy_(up.mT if tucker else up)
            getattr(ours, f"down_{number}").copy_(down)
            if tucker:
                getattr(ours, f"core_{number}").copy_(getattr(layer, f"hada_t{number}")["default"])
    theirs.double()
    assert torch.allclose(net(x), theirs(x), rtol=1e-10, atol=1e-10)


def test_a_1x1_convolution_has_no_core():
    net = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 2, 1))
    medpeft.apply(net, "loha", tucker=True, target="0", head="1")
    assert not net[0].adapters.loha.tucker
    assert np.prod(net[0].adapters.loha.down_1.shape) == 8 * 6
