"""Mona against its formula in NumPy and float64: in blocks by hand, on every grid, and where it is refused."""

import copy

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from by_hand import gelu
from layer_oracles import assert_computes, convolved, drawn
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.formulas.mona import Mona


def numbers(filters):
    return {name: value.detach().numpy() for name, value in filters.named_parameters()}


def mona(p, x, grid, prefix=0):
    """x + Mona(x) of tokens, (B, N, D): three depthwise convolutions one by one, tokens before the patches without."""
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    entered = p["gamma"] * (normed * p["norm.weight"] + p["norm.bias"]) + p["gamma_x"] * x
    z = entered @ p["down"].T + p["down_bias"]
    image = np.moveaxis(z[:, prefix:].reshape(len(x), *grid, -1), -1, 1)
    filtered = image * 1.0
    for side in (3, 5, 7):
        one = convolved(image, p[f"conv_{side}"], padding=side // 2, groups=image.shape[1])
        filtered = filtered + (one + p[f"conv_{side}_bias"][:, None, None]) / 3
    mixed = np.einsum("oi,nihw->nohw", p["mix"], filtered) + p["mix_bias"][:, None, None]
    patches = np.moveaxis(filtered + mixed, 1, -1).reshape(len(x), -1, image.shape[1])
    z = np.concatenate([z[:, :prefix], patches], 1)
    return torch.from_numpy(x + gelu(z) @ p["up"].T + p["up_bias"])


def adapted(model, name, **options):
    """The named block of an adapted model, its plain copy, and the numbers of both Monas."""
    randomise(model.double().eval())
    plain = copy.deepcopy(model.get_submodule(name))
    medpeft.apply(model, "mona", bottleneck=3, **options)
    randomise_adapters(model, size=0.3)
    block = model.get_submodule(name)
    adapter = block.adapters["mona"]
    return block, plain, numbers(adapter.after_attention), numbers(adapter.after_block)


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit_distilled", 2), ("dinov2", 1)])
def test_mona_in_a_block_written_out_by_hand(family, prefix):
    block, plain, first, second = adapted(make(family), "blocks.0")
    side = 2 if family == "dinov2" else 4
    x, grid = drawn(2, prefix + side**2, 16), (side, side)

    with torch.no_grad():
        stream = x + plain.ls1(plain.attn(plain.norm1(x)))
        stream = mona(first, stream.numpy(), grid, prefix)
        stream = stream + plain.ls2(plain.mlp(plain.norm2(stream)))
        expected = mona(second, stream.numpy(), grid, prefix)

    assert_computes(block, x, expected.numpy())


def windowed(library):
    """A model of Swin blocks, the name of one that shifts its windows, and its block by hand."""
    sizes = {"embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": 8, "num_classes": 3}
    if library == "timm":
        return timm.models.SwinTransformer(img_size=32, patch_size=2, **sizes), "layers.0.blocks.1"
    if library == "timm v2":
        return timm.models.SwinTransformerV2(img_size=32, patch_size=2, **sizes), "layers.0.blocks.1"
    return torchvision.models.SwinTransformer([2, 2], 16, [2], [2], [8, 8], num_classes=3), "features.1.1"


@pytest.mark.parametrize("library", ["timm", "timm v2", "torchvision"])
def test_mona_convolves_the_whole_image_where_the_attention_has_windows(library):
    block, plain, first, second = adapted(*windowed(library))
    x, grid = drawn(2, 16, 16, 16), (16, 16)

    with torch.no_grad():
        if library == "timm v2":
            stream = x + plain.norm1(plain._attn(x))
        elif library == "timm":
            stream = x + plain._attn(plain.norm1(x))
        else:
            stream = x + plain.attn(plain.norm1(x))
        stream = mona(first, stream.flatten(1, 2).numpy(), grid).view_as(x)
        layers = [plain.norm2, plain.mlp]
        if library == "timm v2":
            layers.reverse()
        stream = stream + nn.Sequential(*layers)(stream)
        expected = mona(second, stream.flatten(1, 2).numpy(), grid).view_as(x)

    assert_computes(block, x, expected.numpy())


def test_mona_takes_the_grid_of_an_oblong_image_from_the_block():
    model = timm.models.SwinTransformer(
        img_size=(16, 32), patch_size=2, embed_dim=16, depths=(1,), num_heads=(2,), window_size=4
    )
    block, plain, first, second = adapted(model, "layers.0.blocks.0")
    x, grid = drawn(2, 8, 16, 16), (8, 16)

    with torch.no_grad():
        stream = x + plain._attn(plain.norm1(x))
        stream = mona(first, stream.flatten(1, 2).numpy(), grid)
        stream = stream + plain.mlp(plain.norm2(stream))
        expected = mona(second, stream.numpy(), grid).view_as(x)

    assert_computes(block, x, expected.numpy())


def test_mona_in_a_swin_of_transformers_convolves_the_whole_image():
    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2], num_heads=[2], window_size=8, num_labels=3
    )
    model, x = transformers.SwinForImageClassification(config), drawn(2, 256, 16)
    name = next(name for name, _ in model.named_modules() if name.endswith("layers.0.blocks.1"))
    block, plain, first, second = adapted(model, name)
    entered = []
    plain.layernorm_after.register_forward_pre_hook(lambda layer, args: entered.append(args[0]))

    with torch.no_grad():
        plain(x, (16, 16))
        stream = mona(first, entered[0].numpy(), (16, 16))
        stream = stream + plain.mlp(plain.layernorm_after(stream))
        expected = mona(second, stream.numpy(), (16, 16))
        got = block(x, (16, 16))

    torch.testing.assert_close(got[0] if isinstance(got, tuple) else got, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["convnext", "hf_convnext", "resnet"])
def test_mona_stands_after_every_residual_block_of_convolutions(family):
    model, x = make(family), drawn(2, 8, 6, 5)
    place = {"convnext": "stages.1.blocks.0", "hf_convnext": "", "resnet": "layer2.0"}[family]
    if family == "hf_convnext":
        place = next(name for name, m in model.named_modules() if type(m).__name__ == "ConvNextLayer")
    plain = copy.deepcopy(model.get_submodule(place))
    medpeft.apply(model, "mona", bottleneck=3)
    randomise_adapters(model, size=0.3)
    block = model.get_submodule(place)
    x = drawn(2, 16 if family == "resnet" else 8, 6, 5)

    with torch.no_grad():
        y = plain(x)
        tokens = y.flatten(2).mT.numpy()
        expected = mona(numbers(block.adapters["mona"].after_block), tokens, y.shape[2:])

    assert block.adapters["mona"].after_attention is None
    assert_computes(block, x, expected.mT.reshape(y.shape).numpy())


def test_mona_convolves_volumes_in_three_directions():
    from monai.networks.nets.swin_unetr import SwinTransformer

    model = SwinTransformer(
        in_chans=1, embed_dim=12, window_size=(4, 4, 4), patch_size=(2, 2, 2), depths=(1, 1, 1, 1),
        num_heads=(3, 3, 3, 3), spatial_dims=3,
    )  # fmt: skip
    medpeft.apply(randomise(model.double().eval()), "mona", head=None, bottleneck=3)
    randomise_adapters(model, size=0.3)
    filters = model.layers1[0].blocks[0].adapters["mona"].after_block
    image = drawn(1, 5, 6, 7, 3)

    with torch.no_grad():
        first = image.movedim(-1, 1)
        z = first.clone()
        for side in (3, 5, 7):
            kernel, bias = filters.get_parameter(f"conv_{side}"), filters.get_parameter(f"conv_{side}_bias")
            z += nn.functional.conv3d(first, kernel, bias, padding=side // 2, groups=3) / 3
        z = z.movedim(1, -1)
        expected = z + z @ filters.mix.T + filters.mix_bias
        got = filters.on_image(image)

    assert filters.conv_7.shape == (3, 1, 7, 7, 7)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


def test_the_start_is_the_base_and_official_draws_up_as_torch_does():
    model, x = make("vit"), drawn(2, 3, 32, 32)
    base = model(x)
    official = medpeft.apply(make("vit"), "mona", init="official").blocks[0].adapters["mona"].after_block
    medpeft.apply(model, "mona")
    zero = model.blocks[0].adapters["mona"].after_block

    assert torch.equal(model(x), base)
    assert not zero.up.any()
    assert 0.12 < official.up.abs().max() <= 64**-0.5
    assert 0.32 < zero.conv_3.abs().max() <= 1 / 3
    assert torch.equal(zero.gamma, torch.full((16,), 1e-6).double())
    assert torch.equal(zero.gamma_x, torch.ones(16).double())


def test_check_names_the_last_convolutions_of_a_model_that_reads_its_class_token_alone():
    x = drawn(1, 3, 32, 32)

    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.1\.adapters\.mona\.after_block\.conv_3"
    ) as error:
        medpeft.check(medpeft.apply(make("vit"), "mona", bottleneck=3), x)
    assert "blocks.0" not in str(error.value)
    medpeft.check(medpeft.apply(make("vit"), "mona", bottleneck=3, exclude="blocks.1"), x)


def test_mona_refuses_tokens_that_stay_in_windows_outside_the_blocks():
    with torch.device("meta"):
        model = timm.create_model("nest_tiny", num_classes=3)

    with pytest.raises(medpeft.MedpeftError, match="in windows, and not in the order of the image"):
        medpeft.plan(model, "mona", target="levels.*")


def test_mona_says_so_where_tokens_make_no_grid():
    model = medpeft.apply(make("vit"), "mona", bottleneck=3)

    with pytest.raises(medpeft.MedpeftError, match=r"'mona' finds no grid in the 9 tokens of blocks\.0:"):
        model.blocks[0](drawn(1, 9, 16))


def test_a_part_of_a_block_that_runs_by_itself_is_refused():
    model = medpeft.apply(make("vit"), "mona", bottleneck=3)

    with pytest.raises(medpeft.MedpeftError, match=r"in the middle of blocks\.0, of which a part was run"):
        model.blocks[0].norm2(drawn(1, 17, 16))


def test_mona_does_not_merge():
    model = medpeft.apply(make("vit"), "mona", bottleneck=3)

    assert sum(isinstance(module, Mona) for module in model.modules()) == 2
    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0.*: there is a nonlinearity on the residual"):
        medpeft.merge(model)


def test_blocks_of_the_class_token_alone_are_left_out():
    model = timm.create_model("xcit_nano_12_p16_224", depth=1, num_classes=2)
    sites = [site.name for _, site in medpeft.plan(model, "mona").sites]
    assert sites == ["blocks.0"]
    with pytest.raises(medpeft.MedpeftError, match="changes the class token alone"):
        medpeft.plan(model, "mona", target="cls_attn_blocks")


def test_a_block_that_gives_more_channels_than_its_convolutions_is_refused():
    with torch.random.fork_rng():
        model = torchvision.models.ShuffleNetV2([1, 1, 1], [4, 8, 12, 16, 20])
    medpeft.apply(model, "mona", bottleneck=3)

    with pytest.raises(
        medpeft.MedpeftError, match=r"'mona' cannot run in stage2\.0, where there are 8 channels and"
    ):
        model(torch.zeros(1, 3, 64, 64))
