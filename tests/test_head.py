"""The head is found by convention, never by the word."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import medpeft
from medpeft.head import find_head


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("resnet18", ("fc",)),
        ("mobilenetv3_small_050", ("classifier",)),  # Its conv_head is part of the backbone.
        ("convnext_atto", ("head.fc",)),  # Its head.norm too.
        ("deit_tiny_distilled_patch16_224", ("head", "head_dist")),
        ("test_vit", ("head",)),
        ("densenet121", ("classifier",)),
    ],
)
def test_timms_classifier_is_the_head(architecture, head):
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=3)
    assert find_head(model) == head
    medpeft.apply(model, "linear_probe")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if name.startswith(tuple(f"{h}." for h in head))}


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (torchvision.models.resnet18, ("fc",)),
        (torchvision.models.densenet121, ("classifier",)),
        (torchvision.models.vit_b_16, ("heads",)),
        (torchvision.models.swin_t, ("head",)),
    ],
)
def test_torchvisions_last_layer_is_the_head(build, head):
    with torch.device("meta"):
        assert find_head(build(num_classes=3)) == head


def test_a_feature_extractor_has_no_head():
    with torch.device("meta"):
        assert find_head(timm.create_model("resnet18", num_classes=0)) == ()
        assert find_head(timm.create_model("resnet18", num_classes=3), None) == ()


def test_hugging_faces_classifier_is_the_head():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    assert find_head(transformers.ViTForImageClassification(config)) == ("classifier",)
    assert find_head(transformers.ViTModel(config)) == ()


def test_an_unknown_model_must_name_its_head():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(medpeft.MedpeftError, match=r"head of Sequential cannot be told .* pass head='name' \(children: 0, 1\)"):
        medpeft.apply(model, "bias")
    medpeft.apply(model, "bias", head="1")
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.bias", "1.weight", "1.bias"]


def test_a_name_that_is_no_module_is_refused():
    with torch.device("meta"):
        model = timm.create_model("resnet18")
    with pytest.raises(medpeft.MedpeftError, match=r"head='classifier' is no module of ResNet. At its top level are: conv1"):
        medpeft.apply(model, "bias", head="classifier")


def test_a_linear_probe_without_a_head_would_train_nothing():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=0)
    with pytest.raises(medpeft.MedpeftError, match="'linear_probe' would train nothing: ResNet has no head"):
        medpeft.apply(model, "linear_probe")
