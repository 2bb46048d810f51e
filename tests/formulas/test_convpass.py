"""Convpass against its formula in NumPy and float64, on every grid that tokens make."""

import numpy as np
import pytest
import timm
import torch
from by_hand import block_and_adapters, numbers
from layer_oracles import assert_computes, convolved, drawn
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def bypass(p, x, grid, prefix, scale):
    """Convpass on tokens, (B, N, D): patches on their grid, the tokens before them each as an image of one pixel."""
    hidden = quick_gelu(x @ p["down"].T + p["down_bias"])
    image = np.moveaxis(hidden[:, prefix:].reshape(len(x), *grid, -1), -1, 1)
    convolved_image = convolved(image, p["conv"], padding=1) + p["conv_bias"][:, None, None]
    patches = np.moveaxis(convolved_image, 1, -1).reshape(len(x), grid[0] * grid[1], -1)
    alone = [
        (convolved(hidden[:, i, :, None, None], p["conv"], padding=1)[..., 0, 0] + p["conv_bias"])[:, None]
        for i in range(prefix)
    ]
    hidden = quick_gelu(np.concatenate([*alone, patches], 1))
    return scale * (hidden @ p["up"].T + p["up_bias"])


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit_distilled", 2)])
def test_convpass_in_a_block_written_out_by_hand(family, prefix):
    model, plain, p = block_and_adapters(family, "convpass", bottleneck=3, scale=0.5)
    x = drawn(2, prefix + 16, 16)

    with torch.no_grad():
        normed = plain.norm1(x)
        stream = (
            x + plain.attn(normed) + torch.from_numpy(bypass(p["attn"], normed.numpy(), (4, 4), prefix, 0.5))
        )
        normed = plain.norm2(stream)
        expected = (
            stream
            + plain.mlp(normed)
            + torch.from_numpy(bypass(p["mlp"], normed.numpy(), (4, 4), prefix, 0.5))
        )

    assert_computes(model.blocks[0], x, expected.numpy())


def test_convpass_beside_the_attention_alone():
    model = medpeft.apply(make("vit"), "convpass", beside="attention")

    assert [name for name, module in model.named_modules() if name.endswith("adapters")] == [
        "blocks.0.attn.adapters",
        "blocks.1.attn.adapters",
    ]


def test_convpass_refuses_an_attention_that_pools_its_tokens():
    adapter = medpeft.apply(make("vit"), "convpass").blocks[0].attn.adapters["convpass"]
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64)

    assert adapter(x, x).shape == x.shape
    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.0\.attn makes \(1, 2, 2, 16\) of \(1, 4, 4, 16\): it pools"
    ):
        adapter(x, x[:, ::2, ::2])


def test_convpass_takes_the_grid_of_an_oblong_image_from_the_model():
    options = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=(16, 32), **options).double()).eval()
    medpeft.apply(model, "convpass", bottleneck=3, beside="attention")
    randomise_adapters(model)
    adapter = model.blocks[0].attn.adapters["convpass"]
    x, y = drawn(2, 9, 16), drawn(2, 9, 16)

    with torch.no_grad():
        change = (adapter(x, y) - y).numpy()

    assert np.abs(change - bypass(numbers(adapter), x.numpy(), (2, 4), 1, 1.0)).max() < 1e-12


def test_convpass_says_so_where_tokens_make_no_grid():
    options = {
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 2,
        "num_classes": 3,
        "dynamic_img_size": True,
    }
    model = medpeft.apply(timm.create_model("vit_tiny_patch16_224", img_size=32, **options), "convpass")

    with pytest.raises(
        medpeft.MedpeftError, match=r"'convpass' finds no grid in the 9 tokens of blocks\.0\.attn"
    ):
        model(torch.zeros(1, 3, 16, 32))


def test_convpass_convolves_volumes_in_three_directions():
    from monai.networks.nets import ViT

    model = ViT(
        1, (16,) * 3, (8,) * 3, hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, classification=True
    )
    randomise_adapters(medpeft.apply(randomise(model.double()).eval(), "convpass", bottleneck=3))
    adapter = model.blocks[0].attn.adapters["convpass"]
    hidden = drawn(1, 9, 3)

    with torch.no_grad():
        got = adapter._convolved(hidden)
        image = hidden[:, 1:].unflatten(1, (2, 2, 2)).movedim(-1, 1)
        expected = nn.functional.conv3d(image, adapter.conv, adapter.conv_bias, padding=1).flatten(2).mT

    assert adapter.conv.shape == (3, 3, 3, 3, 3)
    torch.testing.assert_close(got[:, 1:], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(got[:, 0], hidden[:, 0] @ adapter.conv[:, :, 1, 1, 1].T + adapter.conv_bias)


def test_convpass_knows_the_class_token_of_each_row_of_blocks():
    with torch.device("meta"):
        model = timm.create_model("crossvit_9_240")

    assert {site.layout.prefix for _, site in medpeft.plan(model, "convpass").sites} == {1}
