"""The head is found by the convention of each library, never by a name that looks like one."""

import pytest
import torch
from models import FAMILIES, make
from torch import nn

import medpeft
from medpeft.architecture.head import find_head

EXPECTED = {
    "resnet": ("fc",),
    "efficientnet": ("classifier",),
    "mobilenetv3": ("classifier",),
    "regnet": ("head.fc",),
    "densenet": ("classifier",),
    "convnext": ("head.fc",),
    "vit": ("head",),
    "deit_distilled": ("head", "head_dist"),
    "dinov2": ("head",),
    "siglip": ("head",),
    "beit": ("head",),
    "eva02": ("head",),
    "swin": ("head.fc",),
    "swinv2": ("head.fc",),
    "maxvit": ("head.fc",),
    "coatnet": ("head.fc",),
    "levit": ("head", "head_dist"),
    "torchvision_resnet": ("fc",),
    "torchvision_vit": ("heads",),
    "torchvision_swin": ("head",),
    "hf_vit": ("classifier",),
    "hf_dinov2": ("classifier",),
    "hf_swin": ("classifier",),
    "hf_convnext": ("classifier",),
    "monai_unet2d": ("model.2",),
    "monai_unet3d": ("model.2",),
    "monai_densenet": ("class_layers.out",),
    "monai_swin_unetr": ("out",),
    "monai_vit": ("classification_head",),
    "clip_vision": (),
    "multihead_attention": ("classifier",),
    "multihead_attention_of_other_widths": ("classifier",),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_head_of_a_family(family):
    assert find_head(make(family)) == EXPECTED[family]


def test_every_family_with_a_head_is_listed():
    assert set(EXPECTED) == {name for name, about in FAMILIES.items() if about.head == "auto"}


@pytest.mark.parametrize(("family", "no_head"), [("mobilenetv3", "conv_head"), ("convnext", "head.norm")])
def test_what_is_called_head_and_is_none_stays_frozen(family, no_head):
    model = medpeft.apply(make(family), "linear_probe")

    assert not any(p.requires_grad for p in model.get_submodule(no_head).parameters())
    assert medpeft.report(model).head == sum(p.numel() for p in model.get_classifier().parameters())


def test_both_heads_of_a_distilled_model_train():
    model = medpeft.apply(make("deit_distilled"), "linear_probe")

    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("AttentionUnet", {"channels": (2, 4), "strides": (2,)}, "model.2"),
        ("FlexibleUNet", {"backbone": "efficientnet-b0"}, "segmentation_head"),
        ("MedNeXt", {"init_filters": 4}, "out_0"),
    ],
)
def test_segmenting_networks_of_monai_end_in_their_head(name, options, head):
    from monai.networks import nets

    with torch.device("meta"):
        model = getattr(nets, name)(spatial_dims=2, in_channels=1, out_channels=3, **options)

    assert find_head(model) == (head,)
    assert [p.shape[0] for p in model.get_submodule(head).parameters() if p.ndim == 1] == [3]


def test_a_model_of_ones_own_with_a_usual_name_has_that_head():
    model = nn.Sequential()
    model.body, model.fc = nn.Linear(4, 4), nn.Linear(4, 2)

    assert find_head(model) == ("fc",)


def test_a_usual_name_that_is_not_last_is_no_head():
    model = nn.Sequential()
    model.fc, model.body = nn.Linear(4, 4), nn.Linear(4, 2)

    with pytest.raises(medpeft.MedpeftError) as error:
        find_head(model)
    assert str(error.value) == (
        "The head of Sequential cannot be told from its class: pass head='name' (children: fc, body), or "
        "head=None if it has none."
    )


def test_a_head_is_given_by_name_or_by_several():
    model = make("vit")

    assert find_head(model, "blocks.1") == ("blocks.1",)
    assert find_head(model, ["norm", "head"]) == ("norm", "head")
    assert find_head(model, None) == ()


@pytest.mark.parametrize("name", ["classifier", ""])
def test_a_name_that_the_model_does_not_have_is_refused(name):
    with pytest.raises(
        medpeft.MedpeftError, match=f"head='{name}' is no module of VisionTransformer. At its top level are"
    ):
        medpeft.apply(make("vit"), "bias", head=name)


def test_without_a_head_no_parameter_of_it_trains_and_adapters_may_go_there():
    model = medpeft.apply(make("vit"), "ssf", head=None)

    assert medpeft.report(model).head == 0
    assert hasattr(model.head, "adapters")
    assert not model.head.weight.requires_grad


def test_a_head_that_is_given_gets_no_adapter():
    model = medpeft.apply(make("vit"), "ssf", head=("norm", "head"))

    assert not hasattr(model.norm, "adapters")
    assert model.norm.weight.requires_grad


def test_a_removed_classifier_leaves_a_feature_extractor():
    model = make("vit")
    model.reset_classifier(0)

    assert find_head(model) == ()
    with pytest.raises(
        medpeft.MedpeftError, match="'linear_probe' would train nothing: VisionTransformer has no head"
    ):
        medpeft.apply(model, "linear_probe")


def test_the_auxiliary_head_of_torchvision_trains_too():
    from torchvision.models import googlenet

    with torch.device("meta"):
        model = googlenet(num_classes=3, init_weights=False, aux_logits=True)

    assert find_head(model) == ("fc", "aux1", "aux2")
