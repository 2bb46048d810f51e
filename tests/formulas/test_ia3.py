"""(IA)³ in a block written out by hand."""

from block_oracles import WIDTH, adapted_vit, assert_same, block, drawn


def test_the_block_by_hand_is_that_of_the_model():
    model, base = adapted_vit("linear_probe")
    x = drawn(2, 5, WIDTH)

    assert_same(model.blocks[0](x), block(x.numpy(), base))


def test_ia3_scales_keys_values_and_the_hidden_channels_of_the_mlp():
    model, base = adapted_vit("ia3")
    x = drawn(2, 5, WIDTH)
    k_scale, v_scale = model.blocks[0].attn.qkv.adapters.ia3.scale.detach().numpy().reshape(2, WIDTH)
    hidden_scale = model.blocks[0].mlp.fc2.adapters.ia3.scale.detach().numpy()

    assert hidden_scale.shape == (4 * WIDTH,)
    assert_same(model.blocks[0](x), block(x.numpy(), base, k_scale, v_scale, hidden_scale))
