"""Prompts are refused with the reason where tokens have positions, windows or a grid."""

import pytest
import timm
import torch
from layer_oracles import drawn
from models import example, make
from prompted import SIZES
from torch import nn
from transformers import Dinov2Backbone, Dinov2Config, Dinov2Model, DPTConfig, DPTForDepthEstimation

import medpeft

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

    assert reason in str(error.value) or "reads the weight of blocks.0.attn.qkv without calling it" in str(
        error.value
    )


def test_shallow_prompts_are_refused_where_every_block_is_given_rotations():
    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.0 is rotated by positions \(RoPE, by the model\)"
    ):
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
    with pytest.raises(
        medpeft.MedpeftError, match=r"blocks\.0 is one of the blocks whose outputs the model hands out"
    ):
        medpeft.apply(model, "vpt_shallow")

    handed = [tuple(y.shape) for y in medpeft.apply(model, "vpt_deep")(x)[1]]

    assert handed == [tuple(y.shape) for y in make("monai_vit")(x)[1]]


def test_a_mask_over_the_tokens_of_shallow_prompts_is_refused_when_it_comes():
    model = medpeft.apply(make("clip_vision"), "vpt_shallow", head=None)
    block, x = model.transformer.resblocks[0], drawn(2, 5, 16)

    with pytest.raises(
        medpeft.MedpeftError,
        match=r"a mask or a bias of shape \(5, 5\) is given with the tokens \(attn_mask\)",
    ):
        block(x, attn_mask=torch.zeros(5, 5, dtype=torch.float64))


def test_tokens_on_a_grid_are_refused_when_they_come():
    model = medpeft.apply(make("vit"), "vpt_deep")

    with pytest.raises(
        medpeft.MedpeftError, match=r"adds tokens to sequences .*blocks\.0 was given \(2, 4, 4, 16\)"
    ):
        model.blocks[0](drawn(2, 4, 4, 16))


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


_TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}


def _timm_features():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=2, features_only=True, out_indices=(0, 1)
    )


@pytest.mark.parametrize(
    "build",
    [
        _timm_features,
        lambda: Dinov2Backbone(Dinov2Config(**_TINY, out_indices=[1, 2])),
        lambda: DPTForDepthEstimation(DPTConfig(**_TINY, backbone_out_indices=[0, 1, 1, 1])),
    ],
)
def test_features_taken_from_several_blocks_are_for_deep_prompts_alone(build):
    with pytest.raises(medpeft.MedpeftError, match="one of the blocks whose outputs the model hands out"):
        medpeft.apply(build(), "vpt_shallow", head=None)
    assert medpeft.plan(build(), "vpt_deep", head=None).trainable


def test_a_transformer_whose_last_block_alone_is_used_takes_shallow_prompts():
    assert medpeft.plan(Dinov2Model(Dinov2Config(**_TINY)), "vpt_shallow", head=None).trainable
