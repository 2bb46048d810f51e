"""AdaptFormer in a block written out by hand."""

import copy

import numpy as np
import torch
from layer_oracles import assert_computes, drawn
from models import make, randomise_adapters

import medpeft


def test_adaptformer_in_a_block_written_out_by_hand():
    for family in ("vit", "dinov2"):  # with and without LayerScale
        for given in ("residual", "norm"):
            model, x = make(family), drawn(2, 5, 16)
            plain = copy.deepcopy(model.blocks[0])
            medpeft.apply(model, "adaptformer", bottleneck=3, input=given, scale=0.7)
            randomise_adapters(model)
            (adapter,) = model.blocks[0].adapters.children()
            p = {name: value.detach().numpy() for name, value in adapter.named_parameters()}

            with torch.no_grad():
                stream = x + plain.ls1(plain.attn(plain.norm1(x)))
                normed = plain.norm2(stream)
                branch = plain.ls2(plain.mlp(normed)).numpy()
            entering = (stream if given == "residual" else normed).numpy()
            hidden = np.maximum(entering @ p["down"].T + p["down_bias"], 0)
            expected = stream.numpy() + branch + 0.7 * (hidden @ p["up"].T + p["up_bias"])

            assert_computes(model.blocks[0], x, expected)


def test_the_learnable_scale_of_adaptformer_is_one_parameter():
    model = medpeft.apply(make("vit"), "adaptformer", scale="learnable")

    assert [tuple(p.shape) for n, p in model.named_parameters() if n.endswith(".scale")] == [(), ()]
