"""Forms of published files, by the names of their tensors, fill the model that they belong to."""

import argparse

import pytest
import torch
import torchvision
from monai.networks.nets import SwinUNETR
from small_weights import prefixed, same_trunk, saved, trunk, vit
from timm.models.vision_transformer import checkpoint_filter_fn
from trainer.errors import TrainerError
from trainer.networks.model import adapted_model, build_model
from trainer.networks.weights import fill, load_weights
from trainer.settings import Settings

import medpeft


def retfound(state):
    """A file of MAE: the encoder, the decoder of its pretraining, and the command line."""
    decoder = {"mask_token": torch.ones(1, 1, 4), "decoder_embed.weight": torch.ones(4, 8)}
    for name in ("norm1.weight", "norm1.bias", "attn.qkv.weight"):
        decoder[f"decoder_blocks.0.{name}"] = torch.ones(4)
    return {
        "model": state | decoder,
        "optimizer": {},
        "epoch": 799,
        "args": argparse.Namespace(mask_ratio=0.75),
    }


def test_retfound_fills_its_vit_and_the_norm_after_the_pooling_is_fresh(tmp_path):
    state = trunk(vit(1))
    file = saved(retfound(state), tmp_path)
    model = vit()
    assert load_weights(model, file).fresh == []
    assert same_trunk(model, state)
    model = vit(global_pool="avg")
    filled = load_weights(model, file)
    assert same_trunk(model, {name: value for name, value in state.items() if not name.startswith("norm.")})
    assert filled.fresh == ["fc_norm"]
    lines = "\n".join(filled.lines("w.pth"))
    assert "train with the head: fc_norm, the head" in lines
    assert "decoder_embed.weight, decoder_blocks.* (3)" in lines
    assert "norm.* (2)" in lines


def test_dinov2_with_chunks_layer_scale_and_another_size_is_resampled_as_by_timm():
    trained = vit(1, init_values=1.0, img_size=56)
    state = trunk(trained) | {"mask_token": torch.ones(1, 8)}
    chunked = {}
    for name, value in state.items():
        chunked[name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.")] = value
    assert "blocks.1.1.attn.qkv.weight" in chunked
    for form in (state, {"teacher": prefixed("backbone.", chunked)}):
        model = vit(init_values=1.0)
        filled = fill(model, form, "w.pth")
        assert filled.resampled == ["pos_embed"]
        assert "brought to the model's size: pos_embed" in "\n".join(filled.lines("w.pth"))
        assert same_trunk(model, checkpoint_filter_fn(dict(state), model))


def test_registers_of_dinov2_become_those_of_timm():
    trained = vit(1)
    state = trunk(trained) | {"register_tokens": torch.randn(1, 4, 8), "mask_token": torch.ones(1, 8)}
    model = vit(reg_tokens=4, no_embed_class=True)
    assert fill(model, state, "w.pth").fresh == []
    assert torch.equal(model.reg_token, state["register_tokens"])
    assert torch.equal(model.cls_token, state["cls_token"] + state["pos_embed"][:, :1])


def test_layers_that_the_model_lacks_are_named_with_the_option_that_makes_them():
    uni = trunk(vit(1, init_values=1.0))
    with pytest.raises(TrainerError, match=r"'blocks.0.ls1.gamma', .*init_values=1e-5 makes"):
        fill(vit(), uni, "w.pth")
    model = vit(init_values=1e-5)
    assert fill(model, uni, "w.pth").fresh == []
    assert same_trunk(model, uni)


def test_radimagenet_numbers_the_children_of_a_network_of_torchvision():
    torch.manual_seed(1)
    trained, model = torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=2)
    encoder = torch.nn.Sequential(*list(trained.children())[:9])
    filled = fill(model, prefixed("backbone.", encoder.state_dict()), "w.pth")
    assert (filled.fresh, filled.unused) == ([], [])
    own = trained.state_dict()
    assert same_trunk(model, {name: value for name, value in own.items() if not name.startswith("fc.")})


SWIN = {"feature_size": 12, "depths": (1, 1, 1, 1), "spatial_dims": 2}


def test_both_files_of_a_self_supervised_swin_unetr_fill_its_encoder():
    torch.manual_seed(1)
    trained = SwinUNETR(1, 1, **SWIN).state_dict()
    encoder = {}
    for name, value in trained.items():
        if name.startswith("swinViT."):
            encoder[name.removeprefix("swinViT.")] = value
    first = {"module.rotation_head.weight": torch.ones(4, 12)}
    for name, value in encoder.items():
        first["module." + name.replace("linear", "fc")] = value
    second = {"encoder.mask_token": torch.ones(1, 1, 12), "encoder.norm.weight": torch.ones(96)}
    for name, value in encoder.items():
        second["encoder." + name.replace(".0.", ".0.0.", 1)] = value
    for form in ({"state_dict": first}, {"model": second}):
        model = SwinUNETR(3, 2, **SWIN)
        filled = fill(model, form, "w.pth")
        assert filled.fresh == [name for name, _ in model.named_children() if name not in ("swinViT", "out")]
        assert filled.resampled == ["swinViT.patch_embed.proj.weight"]
        del encoder["patch_embed.proj.weight"]
        assert same_trunk(model.swinViT, encoder)
        grey = torch.randn(1, 1, 32, 32)
        # (1, 1, 32, 32) → (1, 3, 32, 32): a grey image in three channels
        expected = torch.nn.functional.conv2d(
            grey, trained["swinViT.patch_embed.proj.weight"], trained["swinViT.patch_embed.proj.bias"], 2
        )
        found = model.swinViT.patch_embed.proj(grey.expand(1, 3, 32, 32))
        assert torch.allclose(found, expected, atol=1e-5)
        encoder["patch_embed.proj.weight"] = trained["swinViT.patch_embed.proj.weight"]


def test_a_fresh_decoder_trains_with_the_head(tmp_path):
    trained = SwinUNETR(3, 1, **SWIN)
    file = saved({"model": prefixed("encoder.", trained.swinViT.state_dict())}, tmp_path)
    option = {"feature_size": 12, "depths": (1, 1, 1, 1)}
    checked = Settings(model="monai:SwinUNETR", model_option=option, weights=file, image_size=32)
    model = adapted_model(checked.checked(), 2)
    trains = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert {"encoder1", "decoder5", "out"} <= trains
    medpeft.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(9)
    other = build_model("monai:SwinUNETR", 2, 32, False, 2, option)
    load_weights(other, file)
    medpeft.load(other, tmp_path / "a.safetensors")
    x = torch.randn(1, 3, 64, 64)
    # Channels lie otherwise in memory, which is computed in another order.
    assert torch.allclose(model.eval()(x), other.eval()(x), atol=1e-5)
    assert not model.swinViT.patch_embed.proj.weight.requires_grad
