"""Weights from a file: in every form in which they are published, into the model, or refused with the reason."""

import argparse
import csv

import predict
import pytest
import timm
import torch
import torchvision
from monai.networks.nets import SwinUNETR
from safetensors.torch import save_file
from small_training import draw_stripes, messages, run
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from trainer.errors import TrainerError
from trainer.models import adapted_model, build_model, check_model
from trainer.settings import Settings
from trainer.weights import digest, fill, load_weights

import medpeft

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2}


def vit(seed=0, **more):
    """A ViT of timm, every tensor at random."""
    torch.manual_seed(seed)
    model = VisionTransformer(**{**TINY, "num_classes": 2, **more})
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def trunk(model):
    """The state dict without a head, as an encoder is published."""
    return {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def same_trunk(model, state):
    values = model.state_dict()
    return all(torch.equal(values[name], value) for name, value in state.items())


def saved(content, folder, name="w.pth"):
    torch.save(content, folder / name)
    return folder / name


OTHERS = {"dino_head.mlp.0.weight": torch.ones(3, 3), "step": torch.ones(())}
WRAPPERS = {
    "plain": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(lr=1.0)},
    "state_dict": lambda state: {"state_dict": prefixed("module.", state), "best": 0.5},
    "teacher": lambda state: {
        "student": prefixed("backbone.", {name: value + 1 for name, value in state.items()}),
        "teacher": prefixed("backbone.", state) | OTHERS,
    },
    "lightning": lambda state: {"state_dict": prefixed("model.encoder.", state) | OTHERS, "optimizer": [{}]},
    "optimizer": lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "model": state},
    "averaged": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "model_ema": state},
    "open_clip": lambda state: prefixed("visual.trunk.", state) | {"text.weight": torch.ones(2)},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_model_is_found_in_what_is_wrapped_around_it(wrapper, tmp_path):
    state, model = trunk(vit(1)), vit()
    head = model.head.weight.detach().clone()
    filled = load_weights(model, saved(WRAPPERS[wrapper](state), tmp_path))
    assert same_trunk(model, state)
    assert torch.equal(model.head.weight, head)
    assert (len(filled.tensors), filled.trunk, filled.fresh) == (len(state), len(state), [])
    assert filled.lines("w.pth")[:2] == [
        f"w.pth: {len(state)} tensors before the head, all found",
        "  begin at random, and train with the head: the head",
    ]


def test_safetensors_and_a_head_of_the_same_size_are_taken_too(tmp_path):
    trained, model = vit(1), vit()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    filled = load_weights(model, tmp_path / "w.safetensors")
    assert same_trunk(model, trained.state_dict())
    assert filled.head_fits
    assert load_weights(vit(num_classes=5), tmp_path / "w.safetensors").head_fits is False


# Forms of published files, by the names of their tensors


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


# What is refused


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            lambda: timm.create_model("test_resnet").state_dict(),
            "has 0 of the 30 tensors .*it has 'conv1.0.weight', 'conv1.1.weight'",
        ),
        (lambda: trunk(vit(embed_dim=16)), "of another size .*'cls_token"),
        (lambda: trunk(vit(depth=1)), "lacks 'blocks.1.norm1.weight'"),
        (lambda: trunk(vit(depth=3)), "has 'blocks.2.norm1.weight'.* the model computes without"),
        (lambda: {"epoch": 3}, "has no tensors by name"),
        (lambda: [1, 2], "has no tensors by name"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_model_stays(content, expected):
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainerError, match=expected):
        fill(model, content(), "w.pth")
    assert same_trunk(model, before)


class Foreign:
    pass


def test_files_that_could_run_code_or_are_none_are_refused(tmp_path):
    with pytest.raises(TrainerError, match=r"w.pth holds \S+Foreign beside tensors, .*could run code"):
        load_weights(vit(), saved({"model": trunk(vit()), "config": Foreign()}, tmp_path))
    for name in ("w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(TrainerError, match=rf"{name} cannot be read: .* Give a state dict"):
            load_weights(vit(), tmp_path / name)


def test_a_file_of_before_torch_1_6_is_read(tmp_path):
    state, model = trunk(vit(1)), vit()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "w.pth")
    assert same_trunk(model, state)


def test_a_model_without_memory_is_matched_and_stays_so(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("test_vit", img_size=64, num_classes=0).state_dict()
    file = saved({"model": state}, tmp_path)
    checked = Settings(model="test_vit", weights=file, image_size=32).checked()
    first, fresh, resampled, normalised = check_model(checked)
    assert f"{len(state)} tensors before the head, all found" in first
    assert fresh.endswith("the head")
    assert resampled.endswith("pos_embed")
    assert "mean [0.5, 0.5, 0.5]" in normalised


# In a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    draw_stripes(folder)
    torch.manual_seed(3)
    file = saved({"model": timm.create_model("test_efficientnet").state_dict()}, folder)
    model = ("--model", "test_efficientnet", "--image-size", "32", "--input-std", "0.25", "--weights", file)
    more = ("--epochs", "1", "--no-figures", "--quiet", "--method", "ssf", "--model-option", "drop_rate=0.1")
    run("--data", folder, "--output", folder / "run", *model, *more)
    return folder, file


def rows_of(table):
    """The rows of a CSV by the names of their images."""
    with table.open(newline="") as opened:
        return {row["path"].rpartition("/")[2]: row for row in csv.DictReader(opened) if "across" in str(row)}


def test_predictions_need_the_same_weights(finished, capsys, tmp_path):
    folder, file = finished
    adapter = str(folder / "run" / "adapter.safetensors")
    given = [adapter, str(folder / "across"), "--output", str(tmp_path / "p.csv"), "--quiet"]
    metadata = medpeft.inspect(adapter).metadata
    assert metadata["weights"] == {"file": "w.pth", "sha256": digest(file), "head": None}
    assert (metadata["pretrained"], metadata["model_option"]) == (False, {"drop_rate": 0.1})
    assert predict.main(given) == 2
    assert (
        f"file w.pth (SHA-256 {digest(file)[:12]}…). Give that file with --weights" in capsys.readouterr().err
    )
    other = saved(timm.create_model("test_efficientnet").state_dict(), tmp_path)
    assert predict.main([*given, "--weights", str(other)]) == 2
    assert "another base" in capsys.readouterr().err
    assert predict.main([*given, "--weights", str(file)]) == 0
    found, tested = rows_of(tmp_path / "p.csv"), rows_of(folder / "run" / "predictions.csv")
    across = [name for name, row in tested.items() if row["label"] == "across"]
    assert len(across) >= 3
    for name in across:
        expected = float(tested[name]["p(down)"])
        assert float(found[name]["p(down)"]) == pytest.approx(expected, abs=1e-5)


def test_weights_are_refused_before_an_image_is_read(finished, capsys, tmp_path):
    folder, file = finished
    given = ("--data", folder, "--image-size", "32")
    assert "is no file" in messages(capsys, *given, "--weights", tmp_path / "none.pth")
    said = messages(capsys, *given, "--model", "test_vit", "--weights", file)
    assert "of the 78 tensors of this VisionTransformer before its head" in said
