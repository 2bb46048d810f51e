"""Convpass against its formula in NumPy and float64, on every grid that tokens make."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from by_hand import block_and_adapters, numbers
from layer_oracles import assert_computes, convolved, drawn
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.formulas.convpass import Convpass


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


def windowed(library):
    """A model of Swin blocks, and the name of a block that shifts its windows."""
    if library == "timm":
        model = timm.models.SwinTransformer(
            img_size=32, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=8, num_classes=3
        )
        return model, "layers.0.blocks.1"
    if library == "timm v2":
        model = timm.models.SwinTransformerV2(
            img_size=32, patch_size=2, embed_dim=16, depths=(2,), num_heads=(2,), window_size=8, num_classes=3
        )
        return model, "layers.0.blocks.1"
    return torchvision.models.SwinTransformer([2, 2], 16, [2], [2], [8, 8], num_classes=3), "features.1.1"


def beside_attention(block, library, x):
    """What the block's attention gives for a whole image, (B, H, W, D), and what enters it, by hand."""
    if library == "timm v2":
        return block._attn(x), x
    if library == "timm":
        normed = block.norm1(x)
        return block._attn(normed), normed
    normed = block.norm1(x)
    return block.attn(normed), normed


@pytest.mark.parametrize("library", ["timm", "timm v2", "torchvision"])
def test_convpass_convolves_the_whole_image_beside_windows_that_are_shifted(library):
    model, name = windowed(library)
    randomise(model.double().eval())
    plain = copy.deepcopy(model.get_submodule(name))
    medpeft.apply(model, "convpass", bottleneck=3, scale=0.5, beside="attention")
    randomise_adapters(model, size=0.3)
    block = model.get_submodule(name)
    (adapter,) = (m for m in block.modules() if isinstance(m, Convpass))
    x = drawn(2, 16, 16, 16)

    with torch.no_grad():
        attended, entered = beside_attention(plain, library, x)
        image = entered.flatten(1, 2).numpy()
        y = attended + torch.from_numpy(bypass(numbers(adapter), image, (16, 16), 0, 0.5)).view_as(x)
        if library == "timm v2":
            y = x + plain.norm1(y)
            expected = y + plain.norm2(plain.mlp(y))
        else:
            y = x + y
            expected = y + plain.mlp(plain.norm2(y))

    assert_computes(block, x, expected.numpy())


def test_convpass_beside_the_windows_of_transformers_swin_convolves_the_whole_image():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8, num_labels=3
    )
    model = randomise(transformers.SwinForImageClassification(config).double().eval())
    medpeft.apply(model, "convpass", bottleneck=3, beside="attention")
    randomise_adapters(model, size=0.3)
    (block,) = (m for name, m in model.named_modules() if name.endswith("layers.0.blocks.1"))
    entered, summed, x = [], [], drawn(2, 256, 16)
    block.layernorm_before.register_forward_hook(lambda layer, args, y: entered.append(y))
    block.drop_path.register_forward_hook(lambda layer, args, y: summed.append(y))

    with torch.no_grad():
        block(x, (16, 16))
        with medpeft.disabled(model):
            block(x, (16, 16))
    expected = bypass(numbers(block.adapters["convpass"]), entered[0].numpy(), (16, 16), 0, 1.0)

    torch.testing.assert_close(summed[0] - summed[1], torch.from_numpy(expected), rtol=0, atol=1e-12)


def test_convpass_in_swin_unetr_keeps_the_first_slice_from_the_last():
    from monai.networks.nets.swin_unetr import SwinTransformer, compute_mask, get_window_size

    model = SwinTransformer(
        in_chans=1,
        embed_dim=12,
        window_size=(4, 4, 4),
        patch_size=(2, 2, 2),
        depths=(2, 1, 1, 1),
        num_heads=(3, 3, 3, 3),
        spatial_dims=3,
    )
    medpeft.apply(randomise(model.double().eval()), "convpass", head=None, beside="attention")
    randomise_adapters(model, size=0.3)
    block = model.layers1[0].blocks[1]
    window, shift = get_window_size((8, 8, 8), block.window_size, block.shift_size)
    mask = compute_mask([8, 8, 8], window, shift, torch.device("cpu"))
    summed = []
    block.norm2.register_forward_hook(lambda layer, args, y: summed.append(args[0]))
    x = drawn(1, 8, 8, 8, 12)
    moved = x.clone()
    moved[0, 0, 4, 4] = drawn(12, seed=6)

    with torch.no_grad():
        for volume in (x, moved):
            block(volume, mask)
            with medpeft.disabled(model):
                block(volume, mask)
    added = [adapted - base for adapted, base in zip(summed[::2], summed[1::2], strict=True)]
    slices = ((added[0] - added[1]).abs().sum(-1)[0] > 1e-9).nonzero()[:, 0]

    assert set(slices.tolist()) == {0, 1}


def test_convpass_inside_the_windows_has_its_place_on_the_attention():
    model, _ = windowed("timm")

    medpeft.apply(model, "convpass", beside="attention", windows="inside")

    assert [name for name, module in model.named_modules() if isinstance(module, Convpass)] == [
        f"layers.0.blocks.{i}.attn.adapters.convpass" for i in (0, 1)
    ]


def test_convpass_stays_inside_the_windows_of_sam_which_no_module_is_given_as_a_whole():
    model = timm.create_model(
        "samvit_base_patch16", img_size=64, depth=2, embed_dim=16, num_heads=2, num_classes=2, window_size=2
    )
    x = torch.randn(1, 3, 64, 64)
    base = model.eval()(x)

    medpeft.apply(model, "convpass", beside="attention", bottleneck=2)

    assert "convpass" in model.blocks[0].attn.adapters
    torch.testing.assert_close(model(x), base, rtol=1e-5, atol=1e-5)


def test_convpass_drawn_by_xavier_still_starts_as_the_base():
    model, x = make("vit"), drawn(2, 3, 32, 32)
    base = model(x)
    medpeft.apply(model, "convpass", init="xavier", bottleneck=4)
    conv = model.blocks[0].attn.adapters["convpass"].conv

    # Xavier-uniform over 4·9 inputs and as many outputs: within √(6 / 72).
    assert 0.8 * 12**-0.5 < conv.abs().max() <= 12**-0.5
    assert torch.equal(model(x), base)
    with pytest.raises(medpeft.MedpeftError, match="init='eye'"):
        medpeft.plan(make("vit"), "convpass", init="eye").table()


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


@pytest.mark.parametrize(("name", "target"), [("nest_tiny", "levels.*"), ("hiera_tiny_224", "blocks.*")])
@pytest.mark.parametrize("windows", ["around", "inside"])
def test_convpass_refuses_tokens_that_stay_in_windows_outside_the_blocks(name, target, windows):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)

    with pytest.raises(medpeft.MedpeftError, match="in windows, and not in the order of the image"):
        medpeft.plan(model, "convpass", target=target, windows=windows)
