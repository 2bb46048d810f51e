"""Prompts, computed by hand in float64: right in every kind of model or refused with the reason."""

import copy

import pytest
import timm
import torch
from models import FAMILIES, example, make, output, randomise, randomise_adapters
from test_methods import assert_computes, drawn
from torch import nn

import medpeft

SIZES = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 16, "num_heads": 2, "num_classes": 3}


def vit(**options):
    return randomise(timm.create_model("vit_tiny_patch16_224", **SIZES, **options).double()).eval()


def prompts_of(model):
    return [
        block.adapters[name].prompts.tokens.detach()
        for block in model.blocks
        for name in ("vpt_deep", "vpt_shallow")
        if "adapters" in block._modules and name in block.adapters
    ]


def put_in(x, prompts, at):
    return torch.cat([x[:, :at], prompts.expand(len(x), -1, -1), x[:, at:]], 1)


def taken_off(x, prompts, at):
    return torch.cat([x[:, :at], x[:, at + len(prompts) :]], 1)


def embedded(model, images):
    """What enters the first block of timm's plain ViT."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


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

    assert medpeft.registry.find(method).adapter.identity is False
    assert not torch.equal(output(model, x), base)
    with medpeft.disabled(model):
        assert torch.equal(output(model, x), base)


REFUSED = {
    "beit": "adds a bias for each pair of positions",
    "swin": "attends within windows",
    "swinv2": "attends within windows",
    "maxvit": "adds a bias for each pair of positions",
    "coatnet": "adds a bias for each pair of positions",
    "torchvision_swin": "attends within windows",
    "hf_swin": "attends within windows",
    "monai_swin_unetr": "attends within windows",
}


@pytest.mark.parametrize("family", REFUSED)
@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep"])
def test_models_in_which_tokens_have_positions_are_refused_with_the_reason(family, method):
    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.apply(make(family), method)

    assert REFUSED[family] in str(error.value)
    assert "Try 'adaptformer' or 'lora'" in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_relpos_small_patch16_224", {}, "adds a bias for each pair of positions"),
        ("vit_relpos_small_patch16_224", {"shared_rel_pos": True}, "a bias for each pair of positions"),
        (
            "beit_base_patch16_224",
            {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
            "is given a bias for each pair",
        ),
    ],
)
@pytest.mark.parametrize("method", ["vpt_deep", "prefix"])
def test_relative_positions_are_refused_wherever_they_come_from(name, options, reason, method):
    model = timm.create_model(name, **{**SIZES, **options})

    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.apply(model, method)

    assert reason in str(error.value) or "reads the weight of blocks.0.attn.qkv without calling it" in str(error.value)


ROTATED = {
    "eva02": ("eva02_tiny_patch14_224", {}),
    "registers": ("vit_small_patch16_dinov3", {}),
    "mixed": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.mark.parametrize("variant", ROTATED)
def test_prompts_stand_still_where_patches_are_rotated(variant):
    name, options = ROTATED[variant]
    model, images = randomise(timm.create_model(name, **SIZES, **options).double()).eval(), drawn(2, 3, 32, 32)
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
        if name.endswith(".attention"):
            module.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[1]), with_kwargs=True
            )

    got = model(images).last_hidden_state

    assert {m.prompts.layout.prefix if hasattr(m, "prompts") else m.layout.prefix for m in model.modules() if _adds(m)} == {3}
    assert got.shape == base.shape
    assert not torch.equal(got, base)
    assert set(seen) == {3 + 3 + 16}


def _adds(module):
    return getattr(module, "added", 0) > 0


def test_shallow_prompts_are_refused_where_every_block_is_given_rotations():
    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0 is rotated by positions \(RoPE, by the model\)"):
        medpeft.apply(make("eva02"), "vpt_shallow")


def test_blocks_that_fit_are_adapted_beside_some_that_do_not():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.windows = make("vit"), make("swin")

    planned = medpeft.plan(Two(), "vpt_deep", head=None)

    assert [site.name for _, site in planned.sites] == ["plain.blocks.0", "plain.blocks.1"]
    with pytest.raises(medpeft.MedpeftError, match=r"windows\.layers\.0\.blocks\.0 attends within windows"):
        medpeft.plan(Two(), "vpt_deep", head=None, target="windows.*")


def test_a_model_that_hands_out_its_blocks_outputs_is_for_deep_prompts_alone():
    model, x = make("monai_vit"), example("monai_vit")
    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0 is one of the blocks whose outputs the model hands out"):
        medpeft.apply(model, "vpt_shallow")

    handed = [tuple(y.shape) for y in medpeft.apply(model, "vpt_deep")(x)[1]]

    assert handed == [tuple(y.shape) for y in make("monai_vit")(x)[1]]


class Masked(nn.Module):
    """A transformer block that hands its mask to torch's attention as it is."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x, attn_mask=None):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, attn_mask=attn_mask)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("of", ["numbers", "truth values"])
def test_deep_prompts_are_seen_through_a_mask_and_keep_it_causal(of):
    model, x = nn.ModuleDict({"block": randomise(Masked().double())}).eval(), drawn(2, 5, 16)
    block = model["block"]
    plain = copy.deepcopy(block)
    randomise_adapters(medpeft.apply(model, "vpt_deep", head=None, tokens=3))
    prompts = block.adapters["vpt_deep"].prompts.tokens.detach()
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    wide = torch.zeros(8, 8, dtype=torch.bool)
    wide[3:, 3:] = hidden
    as_given = (lambda m: m) if of == "truth values" else (lambda m: torch.zeros(m.shape).double().masked_fill(m, -torch.inf))

    with torch.no_grad():
        got = block(x, attn_mask=as_given(hidden))
        expected = taken_off(plain(put_in(x, prompts, 0), attn_mask=as_given(wide)), prompts, 0)
        later = block(torch.cat([x[:, :4], drawn(2, 1, 16, seed=8)], 1), attn_mask=as_given(hidden))

    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(later[:, :4], got[:, :4], rtol=1e-12, atol=1e-12)
    assert not torch.equal(later[:, 4], got[:, 4])


def test_a_mask_over_the_tokens_of_shallow_prompts_is_refused_when_it_comes():
    model = medpeft.apply(make("clip_vision"), "vpt_shallow", head=None)
    block, x = model.transformer.resblocks[0], drawn(2, 5, 16)

    with pytest.raises(
        medpeft.MedpeftError, match=r"a mask or a bias of shape \(5, 5\) is given with the tokens \(attn_mask\)"
    ):
        block(x, attn_mask=torch.zeros(5, 5, dtype=torch.float64))


def test_tokens_on_a_grid_are_refused_when_they_come():
    model = medpeft.apply(make("vit"), "vpt_deep")

    with pytest.raises(medpeft.MedpeftError, match=r"adds tokens to sequences .*blocks\.0 was given \(2, 4, 4, 16\)"):
        model.blocks[0](drawn(2, 4, 4, 16))


def test_the_batch_may_come_second():
    from open_clip.transformer import Transformer

    first, second = (randomise(Transformer(16, 2, 2, batch_first=b).double()).eval() for b in (True, False))
    for model in (first, second):
        methods = {"vpt_deep": {}, "vpt_shallow": {"tokens": 6}, "convpass": {"target": "*.mlp"}, "prefix": {}}
        randomise_adapters(medpeft.apply(model, methods, head=None))

    x = drawn(2, 9, 16)
    torch.testing.assert_close(first(x), second(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("family", "attention"), [("vit", "attn"), ("hf_vit", "attention")])
def test_a_convolution_over_the_tokens_takes_added_ones_for_images_of_one_pixel(family, attention):
    methods = {"vpt_deep": {"tokens": 3}, "vpt_shallow": {"tokens": 6}, "prefix": {"tokens": 2}, "convpass": {}}
    model = medpeft.apply(make(family), methods)  # 16 + 3 + 6 tokens would also make a square.
    seen = {}
    for name, module in model.named_modules():
        if name.endswith("adapters.convpass"):
            module._on_grid = lambda image, name=name: seen.setdefault(name, tuple(image.shape[1:3])) and image

    output(model, example(family))

    assert set(seen.values()) == {(4, 4)}
    assert {name.rsplit(".", 3)[1] for name in seen} == {attention, "mlp"}


def test_adapters_in_a_prompted_block_see_the_prompts():
    model, images = make("vit"), drawn(2, 3, 32, 32)
    medpeft.apply(model, {"adaptformer": {"bottleneck": 3}, "vpt_deep": {"tokens": 3}, "vpt_shallow": {"tokens": 2}})
    randomise_adapters(model)
    plain = copy.deepcopy(model)
    deep = [block.adapters["vpt_deep"].prompts.tokens for block in plain.blocks]
    shallow = plain.blocks[0].adapters["vpt_shallow"].prompts.tokens
    for block in plain.blocks:  # AdaptFormer alone is left.
        del block.adapters["vpt_deep"]
        for key in [key for key, hook in block._forward_hooks.items() if hasattr(hook, "__self__")]:
            block._forward_hooks.pop(key)
    del plain.blocks[0].adapters["vpt_shallow"]

    with torch.no_grad():
        x = put_in(embedded(plain, images), shallow, 1)
        for block, prompts in zip(plain.blocks, deep, strict=True):
            x = taken_off(block(put_in(x, prompts, 1)), prompts, 1)
        expected = plain.forward_head(plain.norm(taken_off(x, shallow, 1)))

    assert_computes(model, images, expected.numpy())


@pytest.mark.parametrize(("family", "method"), [("vit", "vpt_shallow+vpt_deep+prefix"), ("torchvision_vit", "prefix")])
def test_compiled_prompts_and_prefixes_compute_the_same_without_a_break(family, method):
    model, x = make(family), example(family)
    randomise_adapters(medpeft.apply(model, method))
    torch._dynamo.reset()

    y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)

    torch.testing.assert_close(y, model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", ["vpt_shallow", "vpt_deep", "prefix"])
def test_checkpointed_blocks_give_the_same_gradients(method):
    gradients = []
    for checkpointed in (False, True):
        model = vit()
        model.set_grad_checkpointing(checkpointed)
        randomise_adapters(medpeft.apply(model, method)).train()
        model(drawn(2, 3, 32, 32).requires_grad_()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "method"), [("vit", "vpt_shallow+vpt_deep"), ("multihead_attention", "prefix"), ("vit", "prefix")]
)
def test_saved_prompts_and_prefixes_come_back(family, method, tmp_path):
    model, x = make(family), example(family)
    randomise_adapters(medpeft.apply(model, method, tokens=4) if "+" not in method else medpeft.apply(model, method))
    medpeft.save(model, tmp_path / "prompts.safetensors")

    loaded = medpeft.load(make(family), tmp_path / "prompts.safetensors")

    assert torch.equal(loaded(x), model(x))


def test_the_lost_end_of_a_row_of_prompts_is_found():
    model = medpeft.apply(make("vit"), "vpt_shallow")
    model.blocks[1]._forward_hooks.clear()

    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0 has lost the hook of its adapters"):
        medpeft.check(model, example("vit"))


def test_autocast_and_low_precision_keep_the_dtype_of_the_stream():
    for method in ("vpt_shallow+vpt_deep", "prefix"):
        model, x = medpeft.apply(make("vit", torch.bfloat16), method), example("vit", torch.bfloat16)
        assert model(x).dtype == torch.bfloat16
        model, x = medpeft.apply(make("vit", torch.float32), method), example("vit", torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        assert (y - model(x)).abs().max() < 0.1 * model(x).abs().max()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("twins_svt_small", r"takes its tokens as a grid \(blocks\.0\.0\)"),
        ("nest_tiny", r"takes its tokens as a grid \(levels\.0\.transformer_encoder\.0\.attn\)"),
        ("coat_tiny", r"convolves the grid of its tokens \(serial_blocks1\.0\.cpe\.proj\)"),
        ("samvit_base_patch16", r"attends within windows \(blocks\.0\)"),
    ],
)
def test_tokens_on_a_grid_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)

    with pytest.raises(medpeft.MedpeftError, match=reason):
        medpeft.plan(model, "vpt_deep")


def test_every_token_before_the_patches_is_counted():
    prefixes = {"pit_xs_distilled_224": 2, "cait_xxs24_224": 1, "vit_small_patch14_reg4_dinov2": 5, "vitamin_small_224": 0}
    for name, prefix in prefixes.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        assert {site.layout.prefix for _, site in medpeft.plan(model, "vpt_deep").sites} == {prefix}, name
