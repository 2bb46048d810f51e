"""DiffFit in a block written out by hand."""

from block_oracles import WIDTH, adapted_vit, assert_same, block, drawn
from models import make

import medpeft


def test_difffit_scales_every_branch_and_trains_every_bias_and_norm():
    model, base = adapted_vit("difffit")
    x = drawn(2, 5, WIDTH)
    gammas = [
        layer.adapters.difffit.gamma.detach().numpy()
        for layer in (model.blocks[0].attn.proj, model.blocks[0].mlp.fc2)
    ]

    assert_same(model.blocks[0](x), block(x.numpy(), base, gammas=gammas))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".adapters." not in name}
    union = medpeft.apply(make("vit"), "bias+norm")
    assert trained == {name for name, p in union.named_parameters() if p.requires_grad}
    assert trained > {"blocks.0.attn.qkv.bias", "norm.weight", "head.weight"}


def test_difffit_takes_a_target_for_its_scales_and_its_biases_alike():
    model = medpeft.apply(make("vit"), "difffit", target="blocks.1")

    trained = {
        name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")
    }
    assert {name.split(".")[1] for name in trained} == {"1"}
    assert {"blocks.1.norm1.weight", "blocks.1.attn.proj.adapters.difffit.gamma"} < trained
