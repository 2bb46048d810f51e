"""Which layers a target picks, and what is said of one that picks none."""

import re
from itertools import pairwise

import pytest
from models import make
from torch import nn

import medpeft
from medpeft.architecture.network import Network
from medpeft.architecture.targets import Selection, picks


def sites(model, method="lora", **options):
    return [site.name for _, site in medpeft.plan(model, method, **options).sites]


MLPS = [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]
ATTENTIONS = [f"blocks.{i}.attn.{layer}" for i in (0, 1) for layer in ("qkv", "proj")]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("blocks.0.*", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
        ("blocks.0", ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
        ("*.fc1", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        ("mlp", MLPS),
        ("attention", ATTENTIONS),
        ("conv", ["patch_embed.proj"]),
        (re.compile(r"\d\.mlp\.fc2$"), ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"]),
        (nn.Conv2d, ["patch_embed.proj"]),
        (
            lambda name, layer: isinstance(layer, nn.Linear) and layer.in_features == 64,
            ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"],
        ),
        (["*.fc1", nn.Conv2d], ["patch_embed.proj", "blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        (("*.0.mlp.fc1", "blocks.0.mlp"), ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]),
    ],
    # A function's name has its address, and processes that share the tests must agree on the names.
    ids=[
        "glob",
        "module",
        "suffix",
        "mlp",
        "attention",
        "conv",
        "expression",
        "type",
        "predicate",
        "several",
        "globs",
    ],
)
def test_a_target_picks_by_glob_role_pattern_type_or_predicate(target, expected):
    assert sites(make("vit"), target=target) == expected


def test_roles_cover_every_fitting_layer_once():
    model = make("vit")
    picked = {role: sites(model, target=role) for role in ("linear", "conv")}

    assert sorted(picked["linear"]) == sorted(MLPS + ATTENTIONS)
    assert sites(model, "ssf", target="norm") == [
        "blocks.0.norm1",
        "blocks.0.norm2",
        "blocks.1.norm1",
        "blocks.1.norm2",
        "norm",
    ]
    assert sites(nn.Sequential(nn.Embedding(4, 4)), target="embedding", head=None) == ["0"]


@pytest.mark.parametrize(
    "exclude", ["*.fc2", re.compile("fc2"), ["blocks.0.mlp.fc2", "blocks.1.mlp.fc2"], lambda n, _: "fc2" in n]
)
def test_an_exclusion_takes_layers_out(exclude):
    assert sites(make("vit"), target="mlp", exclude=exclude) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]


def test_an_exclusion_works_without_a_target():
    assert sites(make("vit"), exclude="blocks.0") == ["blocks.1.attn.qkv"]


def test_without_a_target_lora_takes_every_query_and_value_and_of_a_cnn_every_convolution():
    assert sites(make("vit")) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert sites(make("hf_vit")) == [f"vit.layers.{i}.attention.{p}_proj" for i in (0, 1) for p in "qv"]
    cnn = make("resnet")
    assert sites(cnn) == [name for name, module in cnn.named_modules() if isinstance(module, nn.Conv2d)]


def test_each_method_of_a_union_may_have_a_target_of_its_own():
    model = medpeft.apply(
        make("vit"),
        {"lora": {"rank": 2, "target": "*.fc1"}, "bias": {"target": "blocks.1"}, "ssf": {}},
        target="norm",
        exclude=None,
    )
    found = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("head.")}

    assert {n for n in found if ".lora." in n} == {
        f"blocks.{i}.mlp.fc1.adapters.lora.{side}" for i in (0, 1) for side in ("up", "down")
    }
    assert {n for n in found if n.endswith("bias")} == {
        name for name, _ in model.named_parameters() if name.startswith("blocks.1.") and name.endswith("bias")
    }
    assert {n.partition(".adapters")[0] for n in found if ".ssf." in n} == set(
        sites(make("vit"), "ssf", target="norm")
    )


def test_a_method_of_a_union_may_have_an_exclusion_of_its_own():
    model = make("vit")

    assert sites(model, {"lora": {"exclude": "blocks.0"}, "ssf": {"target": "norm", "exclude": "blocks"}}) == [
        "blocks.1.attn.qkv", "norm"
    ]  # fmt: skip


def test_a_target_of_a_selective_method_picks_among_its_own_layers():
    model = medpeft.apply(make("vit"), "bias", target="attention", head=None)

    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.bias" for layer in ATTENTIONS
    }


@pytest.mark.parametrize(
    ("method", "target", "message"),
    [
        (
            "lora",
            "layer4.*",
            (
                "The pattern 'layer4.*' picks no layer that 'lora' fits in VisionTransformer: 'lora' fits 9 layers here: "
                "patch_embed.proj, blocks.0.attn.qkv, blocks.0.attn.proj, blocks.0.mlp.fc1, blocks.0.mlp.fc2, "
                "blocks.1.attn.qkv, …."
            ),
        ),
        (
            "tsa",
            "blocks.*",
            (
                "The pattern 'blocks.*' picks no layer that 'tsa' fits in VisionTransformer: 'tsa' fits 1 layer here: "
                "patch_embed.proj."
            ),
        ),
        (
            "ssf",
            "head",
            (
                "The pattern 'head' picks no layer that 'ssf' fits in VisionTransformer: it names the head 'head', which is "
                "trained whole: pass head=None to adapt it instead."
            ),
        ),
    ],
)
def test_a_pattern_without_a_hit_is_refused_with_the_names_there_are(method, target, message):
    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.plan(make("vit"), method, target=target)

    assert str(error.value) == message


def test_one_of_several_patterns_without_a_hit_is_refused_too():
    with pytest.raises(medpeft.MedpeftError, match=re.escape("The pattern 'block.1' picks no layer")):
        medpeft.plan(make("vit"), "lora", target=["blocks.0", "block.1"])


def test_an_exclusion_without_a_hit_is_refused():
    with pytest.raises(
        medpeft.MedpeftError, match=re.escape("The pattern '*.fc3' picks no layer that 'lora' fits")
    ):
        medpeft.plan(make("vit"), "lora", target="mlp", exclude="*.fc3")


def test_an_exclusion_of_everything_is_refused():
    with pytest.raises(medpeft.MedpeftError, match="'lora' found nothing to train in VisionTransformer"):
        medpeft.plan(make("vit"), "lora", target="mlp", exclude="blocks")


def test_what_is_no_pattern_is_refused():
    with pytest.raises(
        medpeft.MedpeftError, match=r"target 3 is no pattern: give a glob such as 'blocks\.\*', a role"
    ):
        medpeft.plan(make("vit"), "lora", target=[3])


def test_a_glob_names_a_module_and_all_that_is_inside_it_but_not_its_namesakes():
    network = Network(
        nn.ModuleDict(
            {"fc": nn.Linear(1, 1), "fc1": nn.Linear(1, 1), "b": nn.ModuleDict({"fc": nn.Linear(1, 1)})}
        )
    )

    assert [name for name in network.modules if picks(network, "fc", name)] == ["fc"]
    assert [name for name in network.modules if picks(network, "b", name)] == ["b", "b.fc"]
    assert [name for name in network.modules if picks(network, "*fc", name)] == ["fc", "b.fc"]


def test_the_attention_block_of_diffusers_is_its_element_of_attentions():
    blocks = set(Network(make("diffusion_unet")).attention_blocks.values())

    assert blocks == {
        "unet.down_blocks.0.attentions.0", "unet.mid_block.attentions.0",
        "unet.up_blocks.1.attentions.0", "unet.up_blocks.1.attentions.1",
    }  # fmt: skip


def test_adaptformer_taps_the_norm_before_the_mlp_or_the_mlp_itself():
    names = {block.name: (block.mlp, block.norm) for block in Network(make("vit")).blocks()}

    assert names == {"blocks.0": ("mlp", "norm2"), "blocks.1": ("mlp", "norm2")}


def test_ssf_leaves_a_convolution_before_a_batch_or_instance_norm_to_that_norm():
    for family in ("resnet", "monai_unet2d", "densenet", "efficientnet"):
        model = make(family)
        adapted = sites(model, "ssf")
        leaves = [
            (n, m)
            for n, m in model.named_modules()
            if next(m.children(), None) is None and any(True for _ in m.parameters())
        ]
        erasing = [
            before
            for (before, conv), (_, norm) in pairwise(leaves)
            if isinstance(conv, nn.Conv2d)
            and "BatchNorm" in str(type(norm))
            and conv.out_channels == norm.num_features
        ]
        assert not set(erasing) & set(adapted), family
        assert adapted, family


def test_a_target_and_an_exclusion_are_a_value_that_can_be_compared():
    def last(name, layer):
        return name.endswith("fc2")

    chosen = Selection.of(["attention", last, re.compile("fc1$")], nn.Conv2d)

    assert chosen == Selection.of(["attention", last, re.compile("fc1$")], [nn.Conv2d])
    network = Network(make("vit"))
    assert chosen.picks(network, "blocks.0.mlp.fc2")
    assert not chosen.picks(network, "patch_embed.proj")
    assert not Selection.of(None, "blocks.0").picks(network, "blocks.0.mlp.fc2")
