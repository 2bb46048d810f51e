"""Which layers a target picks."""

import re

import pytest
import timm
import torch
from torch import nn

import medpeft
from medpeft.targets import Network


@pytest.fixture(scope="module")
def vit():
    with torch.device("meta"):
        return timm.create_model("test_vit", num_classes=3)


def places(model, method="lora", **options):
    return [site.name for _, site in medpeft.plan(model, method, **options).sites]


def test_a_glob_picks_by_name(vit):
    assert places(vit, target="blocks.0.mlp.*") == ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]
    assert places(vit, target="*.fc1") == [f"blocks.{i}.mlp.fc1" for i in range(len(vit.blocks))]


def test_the_name_of_a_module_picks_everything_inside(vit):
    assert places(vit, target="blocks.1") == [f"blocks.1.{n}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def test_a_role_picks_by_what_the_layer_does(vit):
    assert all(".attn." in name for name in places(vit, target="attention"))
    assert all(".mlp." in name for name in places(vit, target="mlp"))
    assert places(vit, target="conv") == ["patch_embed.proj"]
    assert len(places(vit, target="linear")) == 4 * len(vit.blocks)
    assert all("norm" in name for name in places(vit, "ssf", target="norm"))


def test_a_regular_expression_a_type_and_a_predicate_pick(vit):
    assert places(vit, target=re.compile(r"\.1\..*fc2$")) == ["blocks.1.mlp.fc2"]
    assert places(vit, target=nn.Conv2d) == ["patch_embed.proj"]
    wide = places(vit, target=lambda name, layer: isinstance(layer, nn.Linear) and layer.out_features > layer.in_features)
    assert all(name.endswith(("qkv", "fc1")) for name in wide)


def test_several_patterns_add_up_and_an_exclusion_takes_away(vit):
    assert places(vit, target=["blocks.0", nn.Conv2d], exclude=["*.mlp", "*.proj"]) == ["blocks.0.attn.qkv"]


def test_a_target_holds_for_selective_methods_too(vit):
    chosen = medpeft.plan(vit, "bias", target="blocks.0").selected
    assert all(name.startswith(("blocks.0.", "head.")) for name in chosen)
    assert "blocks.0.mlp.fc1.bias" in chosen


def test_a_method_may_have_a_target_of_its_own(vit):
    planned = medpeft.plan(vit, {"lora": {"target": "blocks.0.attn.qkv"}, "ssf": {"target": "blocks.1.norm1"}})
    assert [(method.name, site.name) for method, site in planned.sites] == [
        ("lora", "blocks.0.attn.qkv"),
        ("ssf", "blocks.1.norm1"),
    ]


@pytest.mark.parametrize("where", ["target", "exclude"])
def test_a_pattern_without_a_hit_shows_what_there_is(vit, where):
    with pytest.raises(medpeft.MedpeftError, match=r"'layers\.\*' picks no layer that 'lora' fits .*blocks\.0\.attn\.qkv"):
        medpeft.plan(vit, "lora", **{where: "layers.*"})


def test_a_target_that_names_the_head_is_told_so(vit):
    with pytest.raises(medpeft.MedpeftError, match="names the head 'head', which is trained whole: pass head=None"):
        medpeft.plan(vit, "lora", target="head")
    assert places(vit, target="head", head=None) == ["head"]


def test_a_pattern_of_another_kind_is_refused(vit):
    with pytest.raises(medpeft.MedpeftError, match="target 3 is no pattern: give a glob such as"):
        medpeft.plan(vit, "lora", target=["*", 3])


@pytest.mark.parametrize(
    ("method", "message"),
    [("tsa", "'tsa' found nothing to train in VisionTransformer"), ("bn", "'bn' found nothing .* Try 'norm' or 'ssf'")],
)
def test_a_method_that_does_not_fit_says_what_the_model_has(vit, method, message):
    with pytest.raises(medpeft.MedpeftError, match=rf"{message}.*This model has .*Linear"):
        medpeft.plan(vit, method)


def test_a_shared_layer_is_adapted_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(4, 2)).eval()
    x = torch.randn(3, 4)
    plain = model(x).detach()
    medpeft.apply(model, "lora", head="3", target="linear", rank=2)
    assert len(medpeft.report(model).rows) == 2
    assert model[0] is model[2]
    with torch.no_grad():
        shared.adapters["lora"].up.normal_()
    assert not torch.allclose(model(x), plain)
    medpeft.remove(model)
    assert torch.equal(model(x), plain)


def test_ssf_leaves_a_convolution_before_a_batchnorm_to_it():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=3)
    names = places(model, "ssf")
    assert "bn1" in names
    assert "conv1" not in names
    assert len(names) == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_a_weight_that_a_parent_reads_is_found_with_its_reader():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
    network = Network(model)
    found = {site.name + "." + site.weight: site.reader for site in network.sites("linear")}
    assert found["layers.0.self_attn.in_proj_weight"] == "layers.0"
    assert found["layers.0.self_attn.out_proj.weight"] == "layers.0"
    assert found["layers.0.linear1.weight"] == "layers.0"


def test_heads_per_part_are_found_where_heads_come_first():
    with torch.device("meta"):
        model = timm.create_model("coatnet_pico_rw_224")
    site = next(s for s in Network(model).sites("conv", "linear") if s.rows)
    channels, heads = site.host.shape[0], site.rows[0].groups
    assert heads > 1
    indices = sorted(i for row in site.rows for i in row.indices(channels))
    assert indices == list(range(channels))
    assert site.rows[1].indices(channels)[0] == channels // heads // 3
