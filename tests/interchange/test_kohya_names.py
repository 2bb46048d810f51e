"""Names of layers in kohya's files: of UNets and text encoders, and those that are not clear."""

import pytest
import torch
from lora_files import close, denoised, refused, text_encoder, unet
from models import example, randomise_adapters
from safetensors.torch import load_file, save_file
from torch import nn

import medpeft
from medpeft.interchange import from_kohya, to_kohya
from medpeft.interchange.flat_names import layers_by_key

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize(
    "options", [{"parts": "qkvo", "alpha": 3}, {"target": "*", "parts": "qkvo", "rslora": True}]
)
def test_diffusers_reads_what_medpeft_wrote_for_a_unet(options, tmp_path):
    model = randomise_adapters(medpeft.apply(unet(), "lora", head=None, rank=2, **options), size=0.3)
    x, path = example("diffusion_unet"), tmp_path / "a.safetensors"
    to_kohya(model, path)
    theirs = unet()
    pipeline = diffusers.StableDiffusionPipeline
    tensors, alphas = pipeline.lora_state_dict(str(path), unet_config=theirs.config)
    pipeline.load_lora_into_unet(tensors, alphas, theirs)
    with torch.no_grad():
        assert close(denoised(theirs.eval(), x), denoised(model, x))
        assert close(denoised(from_kohya(unet(), path), x), denoised(model, x))


def sdxl():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        layers_per_block=2, block_out_channels=(8, 8, 8), norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=6,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=30,
    )  # fmt: skip


def test_the_original_names_of_sdxl_mean_the_layers_that_diffusers_takes_them_for():
    from diffusers.loaders.lora_conversion_utils import (
        _convert_unet_lora_key,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    model = sdxl()
    original = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb", "out_2")
    ours = {}
    for key, names in layers_by_key(model).items():
        if key.startswith(original):
            ours[f"lora_unet_{key}.lora_down.weight"] = names
    assert len(ours) > 100
    theirs = _maybe_map_sgm_blocks_to_diffusers({key: key for key in ours}, model.config)
    for renamed, key in theirs.items():
        (name,) = ours[key]
        expected = _convert_unet_lora_key(renamed).replace(".processor", "").replace("_lora.down", "")
        expected = (
            expected.replace("to_out.", "to_out.0.").removesuffix(".lora.down.weight").removesuffix(".weight")
        )
        if "attn" in name or "emb" in name or "resnets" not in name:
            assert name.replace("_", ".") == expected.replace("_", "."), key


def test_a_file_by_the_original_names_computes_the_same(tmp_path):
    model = randomise_adapters(medpeft.apply(unet(), "lora", head=None, rank=2, target="*"), size=0.3)
    path = tmp_path / "a.safetensors"
    to_kohya(model, path)
    original = {}
    for key, names in layers_by_key(unet()).items():
        if key.startswith(("input_blocks", "middle_block", "output_blocks", "time_embed_", "out_2")):
            original["lora_unet_" + names[0].replace(".", "_")] = f"lora_unet_{key}"
    renamed = {}
    for key, tensor in load_file(path).items():
        layer, _, part = key.partition(".")
        renamed[f"{original[layer]}.{part}"] = tensor
    save_file(renamed, path)
    x = example("diffusion_unet")
    with torch.no_grad():
        assert close(denoised(from_kohya(unet(), path), x), denoised(model, x))


def test_a_unet_and_its_text_encoder_share_a_file(tmp_path):
    text = randomise_adapters(
        medpeft.apply(text_encoder(), "lora", head=None, rank=2, parts="qkvo"), size=0.3
    )
    model = randomise_adapters(medpeft.apply(unet(), "lora", head=None, rank=2), size=0.3)
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    to_kohya(model, path)
    to_kohya(text, other, prefix="lora_te")
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in load_file(other)
    save_file(load_file(path) | load_file(other), path)
    tokens, x = torch.tensor([[0, 3, 4, 1]]), example("diffusion_unet")
    with torch.no_grad():
        assert close(denoised(from_kohya(unet(), path), x), denoised(model, x))
        loaded = from_kohya(text_encoder(), path, prefix="lora_te")
        assert close(loaded(tokens).last_hidden_state, text(tokens).last_hidden_state)
    refused(
        from_kohya,
        unet(),
        path,
        "prefix='lycoris': its keys begin with 'lora_te', 'lora_unet'",
        prefix="lycoris",
    )


def linears(*names):
    model = nn.Module()
    for name in names:
        parent = model
        *path, last = name.split(".")
        for word in path:
            if word not in parent._modules:
                parent.add_module(word, nn.Module())
            parent = parent._modules[word]
        parent.add_module(last, nn.Linear(4, 4))
    return model


def test_a_name_that_may_be_of_two_layers_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    to_kohya(medpeft.apply(linears("a.b_c", "d"), "lora", target="*", head=None), path)
    refused(from_kohya, linears("a.b_c", "a_b.c", "d"), path, "'a_b_c' may be any of 'a.b_c', 'a_b.c'")
    model = medpeft.apply(linears("a.b_c", "a_b.c"), "lora", target="*", head=None)
    with pytest.raises(medpeft.CheckpointError, match="their names differ in dots alone"):
        to_kohya(model, path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (
            "lora_unet_input_blocks_4_1_proj_in",
            "the original names of Stable Diffusion's UNet: take that model",
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv", "the original names of Flux"),
        ("lora_unet_joint_blocks_0_x", "the original names of Stable Diffusion 3"),
        ("lora_unet_nowhere", "which has no 'nowhere'"),
        ("unet.mid_block.proj", "Files of diffusers and peft are read by from_diffusers and from_peft"),
    ],
)
def test_names_of_another_model_are_told_by_their_layout(key, reason, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({f"{key}.lora_down.weight": torch.ones(1, 4), f"{key}.lora_up.weight": torch.ones(4, 1)}, path)
    refused(from_kohya, linears("a"), path, reason)


def test_a_large_rank_fills_up_no_other_layer(tmp_path):
    path = tmp_path / "a.safetensors"
    ranks = {"0": (1, 2**17), "1": (1024, 1)}
    tensors = {}
    for layer, (width, rank) in ranks.items():
        for factor in ("w1", "w2"):
            tensors[f"lycoris_{layer}.hada_{factor}_a"] = torch.ones(width, rank)
            tensors[f"lycoris_{layer}.hada_{factor}_b"] = torch.ones(rank, width)
    save_file(tensors, path)
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1024, 1024))
    from_kohya(model, path, prefix="lycoris")
    assert medpeft.report(model).trainable == sum(tensor.numel() for tensor in tensors.values())
