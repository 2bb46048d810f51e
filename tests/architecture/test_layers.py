"""What a layer is."""

import copy

import pytest
import timm.layers
import torch
import torchvision
from models import make
from torch import nn

import medpeft
from medpeft.architecture import layers as roles
from medpeft.architecture.network import Network

NORMS = [
    (nn.LayerNorm(6), -1, {"ln", "norm"}),
    (nn.RMSNorm(6), -1, {"norm"}),
    (nn.GroupNorm(2, 6), 1, {"norm"}),
    (nn.BatchNorm1d(6), 1, {"bn", "norm"}),
    (nn.BatchNorm3d(6), 1, {"bn", "norm"}),
    (nn.SyncBatchNorm(6), 1, {"bn", "norm"}),
    (nn.InstanceNorm3d(6, affine=True), 1, {"norm"}),
    (timm.layers.LayerNorm(6), -1, {"ln", "norm"}),
    (timm.layers.LayerNorm2d(6), 1, {"ln", "norm"}),
    (timm.layers.RmsNorm(6), -1, {"norm"}),
    (timm.layers.GroupNorm(6, 2), 1, {"norm"}),
    (timm.layers.GroupNorm1(6), 1, {"norm"}),
    (timm.layers.BatchNormAct2d(6), 1, {"bn", "norm"}),
    (timm.layers.FrozenBatchNormAct2d(6), 1, {"norm"}),
    (timm.layers.GroupNormAct(6, group_size=2), 1, {"norm"}),
]


@pytest.mark.parametrize(("layer", "axis", "methods"), NORMS, ids=lambda value: type(value).__name__)
def test_norms_are_known_with_the_axis_of_their_channels(layer, axis, methods):
    trains = any(True for _ in layer.parameters())
    assert roles.is_norm(layer) == trains
    assert roles.norm_channels(layer) == 6
    if trains:
        assert roles.channel_axis(layer) == axis
        for method in ("bn", "ln", "norm"):
            if method in methods:
                assert medpeft.plan(nn.Sequential(layer), method, head=None).trainable > 0
            else:
                with pytest.raises(medpeft.MedpeftError, match=f"'{method}' found nothing to train"):
                    medpeft.plan(nn.Sequential(layer), method, head=None)


@pytest.mark.parametrize(
    "frozen", [torchvision.ops.FrozenBatchNorm2d(4), timm.layers.FrozenBatchNormAct2d(4)], ids=["tv", "timm"]
)
def test_norms_of_buffers_never_train_and_a_model_without_anything_else_says_why(frozen):
    def model(bias):
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), copy.deepcopy(frozen), nn.Conv2d(4, 2, 1))

    for method in ("bias", "bitfit", "bn", "norm"):
        with pytest.raises(
            medpeft.MedpeftError, match=rf"1 \({type(frozen).__name__}\) keeps its weight and"
        ):
            medpeft.plan(model(bias=False), method, head="2")
    with pytest.raises(medpeft.MedpeftError) as raised:
        medpeft.plan(model(bias=False), "adaptformer", head="2")
    assert "buffers" not in str(raised.value)

    tuned = medpeft.apply(model(bias=True), "bias", head=None)
    assert [name for name, p in tuned.named_parameters() if p.requires_grad] == ["0.bias", "2.bias"]
    for method in ("full", "ssf", "lora+bias"):
        tuned = medpeft.apply(model(bias=True), method, head="2")
        assert not tuned[1].bias.requires_grad
        medpeft.check(tuned, torch.rand(2, 3, 6, 6))


def test_the_axis_of_hugging_faces_convnext_norm_is_what_it_was_made_with():
    from transformers.models.convnext.modeling_convnext import ConvNextLayerNorm

    assert roles.channel_axis(ConvNextLayerNorm(4, data_format="channels_first")) == 1
    assert roles.channel_axis(ConvNextLayerNorm(4)) == -1


def test_the_global_response_norm_of_convnext_v2_is_a_norm():
    assert roles.is_norm(timm.layers.grn.GlobalResponseNorm(4))
    assert not roles.is_scaling_norm(timm.layers.grn.GlobalResponseNorm(4))


@pytest.mark.parametrize(
    ("layer", "axis"),
    [
        (nn.Linear(4, 4), -1),
        (nn.Conv1d(4, 4, 1), -2),
        (nn.ConvTranspose3d(4, 4, 1), -4),
        (nn.Embedding(4, 4), -1),
    ],
)
def test_the_axis_of_other_layers(layer, axis):
    assert roles.channel_axis(layer) == axis
    assert not roles.is_norm(layer)


PARTS = {
    "vit": {"qkv": "qkv", "proj": "o"},
    "hf_vit": {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"},
    "transformer_encoder": {"": "qkv", "out_proj": "o"},
    "multihead_attention_of_other_widths": {"": "v", "out_proj": "o"},
    "levit": {"qkv.linear": "qkv", "proj.ln.linear": "o"},
    "diffusion_unet": {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "o"},
    "monai_vit": {"qkv": "qkv", "out_proj": "o"},
}


@pytest.mark.parametrize("family", PARTS)
def test_the_projections_of_an_attention(family):
    first = next(iter(Network(make(family)).attentions.values()))

    assert {projection.path: projection.parts for projection in first} == PARTS[family]


@pytest.mark.parametrize(
    "family", ["resnet", "efficientnet", "densenet", "monai_unet2d", "convnext", "hf_convnext"]
)
def test_a_convolutional_network_has_no_attention(family):
    assert Network(make(family)).attentions == {}


def test_the_body_of_a_resnet_is_its_blocks_without_stem_and_downsampling():
    names = [site.name for _, site in medpeft.plan(make("resnet"), "tsa").sites]

    assert names == [f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2, 3)]
    assert [site.name for _, site in medpeft.plan(make("resnet"), "tsa", sites="3x3").sites] == names[1::3]
    everywhere = [site.name for _, site in medpeft.plan(make("resnet"), "tsa", sites="all").sites]
    assert "layer1.0.downsample.0" in everywhere
    assert set(names) < set(everywhere)


@pytest.mark.parametrize("method", ["bias", "bitfit"])
def test_tables_of_positions_are_biases_only_when_asked_for(method):
    model = make("swin")
    plain = set(medpeft.plan(model, method, head=None).selected)
    with_tables = set(medpeft.plan(model, method, tables=True, head=None).selected)

    assert plain == {name for name, _ in model.named_parameters() if name.endswith(".bias")}
    assert with_tables - plain == {
        name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")
    }


def test_biases_that_a_parent_owns_are_biases():
    model = make("beit")
    selected = set(medpeft.plan(model, "bitfit", head=None).selected)

    assert {f"blocks.{i}.attn.{part}_bias" for i in (0, 1) for part in "qv"} <= selected
    assert selected == {n for n, p in model.named_parameters() if n.endswith("bias") and p.ndim == 1}


def test_the_attention_of_a_model_trains_whole_with_the_shell_around_it():
    model = make("hf_vit")
    selected = set(medpeft.plan(model, "attention", head=None).selected)

    assert selected == {name for name, _ in model.named_parameters() if ".attention." in name}
    blocks = set(medpeft.plan(model, "attention", scope="block", head=None).selected)
    assert blocks == {name for name, _ in model.named_parameters() if name.startswith("vit.layers.")}


def test_an_attention_that_timm_writes_as_convolutions_is_found():
    with torch.device("meta"):
        model = timm.create_model("mobilenetv4_hybrid_medium", num_classes=3)

    assert Network(model).attentions


def test_the_modules_around_one_are_named_from_the_nearest_to_the_outermost():
    assert roles.parents("layer1.0.conv1") == ["layer1.0", "layer1"]
    assert roles.parents("fc") == roles.parents("") == []
    assert roles.within("head.fc.weight", ["stem", "head"])
    assert roles.within("head", ["head"])
    assert not roles.within("head_norm", ["head"])


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(4, 4), "linear"),
        (nn.Conv1d(4, 4, 1), "conv"),
        (nn.ConvTranspose2d(4, 4, 1), "transposed"),
        (nn.Embedding(4, 4), "embedding"),
        (nn.GroupNorm(2, 4), "norm"),
        (nn.ReLU(), ""),
    ],
)
def test_the_kind_of_a_layer_is_that_of_its_weight(layer, kind):
    assert roles.kind_of(layer) == kind
