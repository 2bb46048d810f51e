"""Prompts, computed by hand in float64: right in every kind of model."""

import copy

import pytest
import timm
import torch
from layer_oracles import assert_computes, drawn
from models import FAMILIES, example, make, output, randomise, randomise_adapters
from prompted import SIZES, embedded, prompts_of, put_in, taken_off, vit

import medpeft
from medpeft.adapters.adapters import Adapters
from medpeft.adapters.registry import find

VARIANTS = {
    "class token": ({}, 1),
    "average": ({"global_pool": "avg"}, 1),
    "average without a class token": ({"global_pool": "avg", "class_token": False}, 0),
    "registers": ({"reg_tokens": 4}, 5),
    "attention pooling": ({"global_pool": "map", "class_token": False}, 0),
    "normalised queries and keys": ({"qk_norm": True}, 1),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_deep_prompts_are_replaced_at_every_block_and_pooling_sees_none(variant):
    options, prefix = VARIANTS[variant]
    model, images = vit(**options), drawn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "vpt_deep", tokens=3))
    prompts = prompts_of(model)

    with torch.no_grad():
        x = put_in(embedded(plain, images), prompts[0], prefix)
        for i, block in enumerate(plain.blocks):
            if i:
                x = put_in(taken_off(x, prompts[i - 1], prefix), prompts[i], prefix)
            x = block(x)
        expected = plain.forward_head(plain.norm(taken_off(x, prompts[-1], prefix)))

    assert len(prompts) == len(model.blocks)
    assert_computes(model, images, expected.numpy())


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_prompts_pass_through_all_blocks_and_pooling_sees_none(variant):
    options, prefix = VARIANTS[variant]
    model, images = vit(**options), drawn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "vpt_shallow", tokens=3))
    (prompts,) = prompts_of(model)

    with torch.no_grad():
        x = plain.blocks(put_in(embedded(plain, images), prompts, prefix))
        expected = plain.forward_head(plain.norm(taken_off(x, prompts, prefix)))

    assert_computes(model, images, expected.numpy())


def test_both_heads_of_a_distilled_model_meet_their_own_tokens():
    model, images = make("deit_distilled"), drawn(2, 3, 32, 32)
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "vpt_shallow", tokens=3))
    (prompts,) = prompts_of(model)

    with torch.no_grad():
        x = taken_off(plain.blocks(put_in(embedded(plain, images), prompts, 2)), prompts, 2)
        expected = plain.forward_head(plain.norm(x))

    assert_computes(model, images, expected.numpy())


@pytest.mark.parametrize("family", ["hf_vit", "torchvision_vit", "monai_vit", "clip_vision"])
def test_prompts_of_other_libraries_models_come_after_the_class_token(family):
    model = medpeft.apply(make(family), "vpt_deep", head=FAMILIES[family].head)
    layouts = {m.prompts.layout.prefix for m in model.modules() if hasattr(m, "prompts")}

    assert layouts == {1}


def test_prompts_are_xavier_uniform_over_the_patch_embedding_and_the_width():
    model = medpeft.apply(vit(), "vpt_deep", tokens=100)
    bound = (6 / (3 * 8 * 8 + 16)) ** 0.5

    for prompts in prompts_of(model):
        assert prompts.abs().max() <= bound
        assert prompts.max() > 0.98 * bound
        assert prompts.min() < -0.98 * bound


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep", "prefix"])
def test_what_is_added_to_the_softmax_cannot_start_as_nothing_and_says_so(method):
    model, x = make("vit"), example("vit")
    base = output(model, x)

    medpeft.apply(model, method)

    assert find(method).identity is False
    assert not torch.equal(output(model, x), base)
    with medpeft.disabled(model):
        assert torch.equal(output(model, x), base)


ROTATED = {
    "eva02": ("eva02_tiny_patch14_224", {}),
    "registers": ("vit_small_patch16_dinov3", {}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.mark.parametrize("variant", ROTATED)
def test_prompts_stand_still_where_patches_are_rotated(variant):
    name, options = ROTATED[variant]
    model, images = (
        randomise(timm.create_model(name, **SIZES, **options).double()).eval(),
        drawn(2, 3, 32, 32),
    )
    plain = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, "vpt_deep", tokens=3))
    prompts, prefix = prompts_of(model), model.num_prefix_tokens

    for block, own in zip(plain.blocks, prompts, strict=True):  # As if the prompts were class tokens.
        block.attn.num_prefix_tokens += 3
        block.register_forward_pre_hook(lambda block, args, own=own: (put_in(args[0], own, prefix),))
        block.register_forward_hook(lambda block, args, y, own=own: taken_off(y, own, prefix))
    with torch.no_grad():
        expected = plain(images).numpy()

    assert prefix == {"eva02": 1, "registers": 5, "mixed": 1}[variant]
    assert_computes(model, images, expected)


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow", "prefix"])
def test_prompts_and_prefixes_stand_still_in_hugging_faces_dinov3(method):
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = DINOv3ViTConfig(image_size=32, patch_size=8, num_register_tokens=2, **sizes)
    model, images = randomise(DINOv3ViTModel(config).double()).eval(), drawn(2, 3, 32, 32)
    base = model(images).last_hidden_state
    randomise_adapters(medpeft.apply(model, method, head=None, tokens=3))
    seen = []
    for name, module in model.named_modules():
        if name.endswith(
            ".attention.q_proj"
        ):  # A hook on the attention itself sees what comes before its adapter.
            module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))

    got = model(images).last_hidden_state

    assert {layout.prefix for layout in layouts_with_added_tokens(model)} == {3}
    assert got.shape == base.shape
    assert not torch.equal(got, base)
    assert set(seen) == {3 + 3 + 16}


def layouts_with_added_tokens(model):
    """The layout of every adapter that adds tokens."""
    layouts = [getattr(getattr(module, "prompts", module), "layout", None) for module in model.modules()]
    return [layout for layout in layouts if layout is not None and layout.adds > 0]


@pytest.mark.parametrize(("family", "attention"), [("vit", "attn"), ("hf_vit", "attention")])
def test_a_convolution_over_the_tokens_takes_added_ones_for_images_of_one_pixel(family, attention):
    methods = {
        "vpt_deep": {"tokens": 3},
        "vpt_shallow": {"tokens": 6},
        "prefix": {"tokens": 2},
        "convpass": {},
    }
    model = medpeft.apply(make(family), methods)  # 16 + 3 + 6 tokens would also make a square.
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("adapters.convpass"):
            module._on_grid = lambda image, name=name: (
                seen.setdefault(name, tuple(image.shape[1:3])) and image
            )

    output(model, example(family))

    assert set(seen.values()) == {(4, 4)}
    assert {name.rsplit(".", 3)[1] for name in seen} == {attention, "mlp"}


def test_adapters_in_a_prompted_block_see_the_prompts():
    model, images = make("vit"), drawn(2, 3, 32, 32)
    medpeft.apply(
        model, {"adaptformer": {"bottleneck": 3}, "vpt_deep": {"tokens": 3}, "vpt_shallow": {"tokens": 2}}
    )
    randomise_adapters(model)
    plain = copy.deepcopy(model)
    deep = [block.adapters["vpt_deep"].prompts.tokens for block in plain.blocks]
    shallow = plain.blocks[0].adapters["vpt_shallow"].prompts.tokens
    for block in plain.blocks:
        block.adapters = Adapters({"adaptformer": block.adapters["adaptformer"]})  # It alone is left.

    with torch.no_grad():
        x = put_in(embedded(plain, images), shallow, 1)
        for block, prompts in zip(plain.blocks, deep, strict=True):
            x = taken_off(block(put_in(x, prompts, 1)), prompts, 1)
        expected = plain.forward_head(plain.norm(taken_off(x, shallow, 1)))

    assert_computes(model, images, expected.numpy())


def test_every_token_before_the_patches_is_counted():
    prefixes = {
        "pit_xs_distilled_224": 2,
        "cait_xxs24_224": 1,
        "vit_small_patch14_reg4_dinov2": 5,
        "vitamin_small_224": 0,
    }
    for name, prefix in prefixes.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert {site.layout.prefix for _, site in medpeft.plan(model, "vpt_deep").sites} == {prefix}, name


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
def test_dropout_of_prompts_draws_anew_for_every_image(method):
    model = medpeft.apply(make("vit"), method, dropout=0.5, tokens=3).train()
    entered = []
    model.blocks[0].norm1.register_forward_hook(lambda layer, args, y: entered.append(args[0][:, 1:4]))

    model(drawn(8, 3, 32, 32))

    assert len({tuple((image == 0).flatten().tolist()) for image in entered[0]}) > 4
    kept = entered[0].detach()[entered[0] != 0]
    prompts = 2 * model.blocks[0].adapters[method].prompts.tokens.detach()
    assert torch.isin(kept, prompts.flatten()).all()
