"""LoKr against its formula in NumPy and against peft."""

import numpy as np
import peft
import pytest
import torch
from block_oracles import WIDTH, adapted_vit, assert_same, block, drawn, merged_weights
from peft.tuners.lokr.layer import factorization
from torch import nn

import medpeft
from medpeft.formulas.lokr import split


@pytest.mark.parametrize(("rank", "factor"), [(100, -1), (1, 4)])
def test_lokr_adds_a_kronecker_product(rank, factor):
    model, base = adapted_vit("lokr", rank=rank, factor=factor, alpha=2.0 * rank)
    changed = {}
    for name in ("attn.qkv", "attn.proj"):
        adapter = model.blocks[0].get_submodule(name).adapters.lokr
        C = adapter.first["whole"].detach().numpy()
        second = {key: value.detach().numpy() for key, value in adapter.second.items()}
        D = second["whole"] if "whole" in second else second["up"] @ second["down"]
        assert ("whole" in second) == (rank == 100)
        changed[f"{name}.weight"] = base[f"{name}.weight"] + 2.0 * np.kron(C, D)
        assert_same(merged_weights(model)[f"blocks.0.{name}.weight"], changed[f"{name}.weight"])
    x = drawn(2, 5, WIDTH)
    assert_same(model.blocks[0](x), block(x.numpy(), {**base, **changed}))


@pytest.mark.parametrize("channels", [1, 2, 7, 12, 48, 64, 127, 768, 3072])
@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 8, 16])
def test_channels_are_split_as_pefts_are(channels, factor):
    assert split(channels, factor) == factorization(channels, factor)


CASES = {
    "whole": {"rank": 100},
    "product": {"rank": 1},
    "core": {"rank": 1, "tucker": True},
    "both": {"rank": 1, "both": True, "factor": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_layer_equals_pefts(kind, case):
    options = CASES[case]

    def make():
        torch.manual_seed(0)
        if kind == "linear":
            return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 2)).double()
        return nn.Sequential(nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(16, 2, 1)).double()

    x = drawn(2, 12) if kind == "linear" else drawn(2, 12, 5, 5)
    config = peft.LoKrConfig(
        r=options["rank"],
        alpha=3,
        target_modules=["0"],
        init_weights=False,
        use_effective_conv2d=options.get("tucker", False),
        decompose_both=options.get("both", False),
        decompose_factor=options.get("factor", -1),
    )
    theirs = peft.get_peft_model(make(), config).double()
    net = medpeft.apply(make(), "lokr", alpha=3.0, **options, target="0", head="1")
    ours, layer = net[0].adapters.lokr, theirs.base_model.model[0]
    names = {"whole": "", "up": "_a", "down": "_b"}
    with torch.no_grad():
        for number, factors in ((1, ours.first), (2, ours.second)):
            for key, value in factors.items():
                if key == "core":
                    value.copy_(layer.lokr_t2["default"])
                    continue
                their = getattr(layer, f"lokr_w{number}{names[key]}")["default"]
                if key == "up" and "core" in factors:
                    their = their.mT
                value.copy_(their)
    assert torch.allclose(net(x), theirs(x), rtol=1e-10, atol=1e-10)
    with medpeft.merged(net):
        assert torch.allclose(net(x), theirs(x), rtol=1e-10, atol=1e-10)
