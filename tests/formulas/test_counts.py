"""Trainable parameters, as integers, of the models in the papers, on the meta device."""

import re
from functools import cache
from itertools import pairwise

import pytest
import torch
from models import FAMILIES, example, make, on_meta, randomise_adapters
from torch import nn

import medpeft
from medpeft.architecture.network import Network
from medpeft.architecture.rows import Rows

RESNET50 = [
    ("full", {}, 23_508_032),
    ("linear_probe", {}, 0),
    ("tsa", {}, 10_616_832),
    ("tsa", {"sites": "3x3"}, 1_257_472),
    ("bn", {}, 53_120),
    ("norm", {}, 53_120),
    ("bias", {}, 26_560),
    ("ssf", {}, 53_120),
    ("lora", {"rank": 4}, 317_772),
    ("lora", {"rank": 8}, 635_544),
    ("lora", {"rank": 16}, 1_271_088),
    ("svdiff", {}, 13_248),
    # Of the 3×3 convolutions, N of them from D to D channels, in four stages: N·(9D + D²/4 + D), and N·D².
    (
        "conv_adapter",
        {},
        sum(n * (9 * d + d * d // 4 + d) for n, d in ((3, 64), (4, 128), (6, 256), (3, 512))),
    ),
    (
        "conv_adapter",
        {"reduction": 8},
        sum(n * (10 * d + d * d // 8) for n, d in ((3, 64), (4, 128), (6, 256), (3, 512))),
    ),
    ("residual_adapter", {}, 1_257_472),
    ("residual_adapter", {"form": "series"}, 1_257_472),
]

VIT = [
    ("full", {}, (85_798_656, 303_301_632, 630_764_800)),
    ("attention", {}, (28_348_416, 100_761_600, 209_879_040)),
    ("bitfit", {}, (102_912, 272_384, 453_120)),
    ("bias", {}, (102_912, 272_384, 453_120)),
    ("ln", {}, (38_400, 100_352, 166_400)),
    ("bias+norm", {}, (122_112, 322_560, 536_320)),
    ("bias+norm+attention", {}, (28_433_664, 100_985_856, 210_251_520)),
    ("lora", {}, (294_912, 786_432, 1_310_720)),
    ("lora", {"parts": "qkv"}, (442_368, 1_179_648, 1_966_080)),
    ("lora", {"target": "blocks.*"}, (1_179_648, 3_145_728, 5_242_880)),
    ("lora", {"dora": True}, (313_344, 835_584, 1_392_640)),
    ("ssf", {}, (205_824, 544_768, 906_240)),
    ("adaptformer", {"bottleneck": 64}, (1_189_632, 3_171_840, 5_285_888)),
    ("svdiff", {}, (37_632, 99_072, 164_428)),
    ("houlsby", {"bottleneck": 64}, (2_379_264, 6_343_680, 10_571_776)),
    ("pfeiffer", {"bottleneck": 64}, (1_189_632, 3_171_840, 5_285_888)),
    ("adapter_plus", {"bottleneck": 8}, (165_984, 442_560, 737_536)),
    ("convpass", {"bottleneck": 8}, (327_552, 864_000, 1_430_528)),
    ("convpass", {"beside": "attention"}, (163_776, 432_000, 715_264)),
    ("vpt_shallow", {"tokens": 10}, (7_680, 10_240, 12_800)),
    ("vpt_deep", {"tokens": 10}, (92_160, 245_760, 409_600)),
    ("prefix", {"tokens": 10}, (184_320, 491_520, 819_200)),  # 2nDL
]
# Depth L and width D of the three; the MLP is 4·D wide.
SIZES = ((12, 768), (24, 1024), (32, 1280))


def ladder(blocks, width, side):
    """Of LST: a step Down, its α and a transformer block for each block; Down before them, norm and Up after them."""
    transformer = 12 * side**2 + 13 * side
    return (
        blocks * (side * (width + 1) + 1 + transformer) + side * (width + 1) + 2 * side + width * (side + 1)
    )


VIT += [
    ("repadapter", {"bottleneck": 8, "groups": 2}, (239_808, 639_360, 1_065_472)),
    ("repadapter", {"bottleneck": 4, "groups": 1}, tuple(2 * L * (4 * D + 4 + 4 * D + D) for L, D in SIZES)),
    ("vera", {"rank": 256}, (24_576, 61_440, 98_304)),
    ("vera", {"rank": 64, "parts": "qkvo"}, tuple(4 * L * (64 + D) for L, D in SIZES)),
    ("ia3", {}, tuple(L * (D + D + 4 * D) for L, D in SIZES)),
    ("fact", {"rank": 16}, tuple(12 * L * 16**2 + 2 * D * 16 for L, D in SIZES)),
    ("fact", {"rank": 32, "form": "tucker"}, tuple(12 * L * 32 + 32**3 + 2 * D * 32 for L, D in SIZES)),
    (
        "difffit",
        {},
        tuple(both + 2 * L * D for both, (L, D) in zip((122_112, 322_560, 536_320), SIZES, strict=True)),
    ),
    ("loha", {"rank": 8}, tuple(L * 2 * 8 * (3 * D + D + D + D) for L, D in SIZES)),
    # C and D of the fused projection, then of the output: the divisors nearest the roots of 3·D and D.
    ("lokr", {"rank": 8}, (12 * 2_880, 24 * 3_840, 32 * 4_416)),
    ("shira", {"rank": 4}, tuple(L * 4 * (3 * D + D + D + D) for L, D in SIZES)),
    ("miss", {"rank": 16}, tuple(L * 16 * (3 * D + D) for L, D in SIZES)),
    ("mona", {}, (2_684_928, 7_004_160, 11_517_952)),
    ("dtl", {}, (36_864, 98_304, 163_840)),
    ("dtl", {"convolve": True}, (43_776, 107_520, 175_360)),
    ("lst", {}, tuple(ladder(L, D, D // 8) for L, D in SIZES)),
    ("lst", {"reduction": 4}, tuple(ladder(L, D, D // 4) for L, D in SIZES)),
    ("oft", {"block_size": 32}, tuple(2 * L * (D // 32) * (32 * 31 // 2) for L, D in SIZES)),
]
VITS = ["vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"]


def assert_count(model, method, options, count):
    planned = medpeft.plan(model, method, **options).trainable
    medpeft.apply(model, method, **options)
    report = medpeft.report(model)
    assert report.trainable - report.head == count
    assert planned == report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(("method", "options", "count"), RESNET50)
def test_resnet50(method, options, count):
    assert_count(on_meta("resnet50"), method, options, count)


@pytest.mark.parametrize(("method", "options", "counts"), VIT)
@pytest.mark.parametrize("size", [0, 1, 2], ids=["base", "large", "huge"])
def test_vision_transformers(size, method, options, counts):
    assert_count(on_meta(VITS[size]), method, options, counts[size])


def test_conv_adapter_on_convnext_takes_the_convolutions_between_the_stages_too():
    # A block of D channels: D/4 groups of 4 channels in a kernel of 7·7, D·D/4, and D. Between I and O: 4·I, O·I/4, O.
    depths, dims = (3, 3, 9, 3), (96, 192, 384, 768)
    blocks = sum(n * (49 * d + d * d // 4 + d) for n, d in zip(depths, dims, strict=True))
    between = sum(4 * i + i * o // 4 + o for i, o in pairwise(dims))

    assert_count(on_meta("convnext_tiny"), "conv_adapter", {}, blocks + between)


def test_repadapter_on_convnext_stands_before_both_parts_of_every_block():
    depths, dims = (3, 3, 9, 3), (96, 192, 384, 768)
    count = sum(2 * n * (d * 8 + 8 + d * 8 // 2 + d) for n, d in zip(depths, dims, strict=True))

    assert_count(on_meta("convnext_tiny"), "repadapter", {}, count)


def test_conv_adapter_on_efficientnet_is_around_its_blocks():
    # Output channels, number of blocks, kernel of the first convolution of each stage; the bottleneck is a quarter.
    stages = ((16, 1, 3), (24, 2, 1), (40, 2, 1), (80, 3, 1), (112, 3, 1), (192, 4, 1), (320, 1, 1))
    count, inputs = 0, 32
    for outputs, blocks, kernel in stages:
        for _ in range(blocks):
            count += inputs * kernel**2 + outputs * (inputs // 4) + outputs
            inputs = outputs

    assert_count(on_meta("efficientnet_b0"), "conv_adapter", {}, count)


@pytest.mark.parametrize(("classes", "head"), [(2, 4_098), (3, 6_147), (7, 14_343)])
def test_the_head_counts_apart(classes, head):
    model = medpeft.apply(on_meta("resnet50", classes), "bias")

    report = medpeft.report(model)

    assert (report.head, report.trainable) == (head, head + 26_560)


@cache
def _diffusion_unet():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768)


@pytest.mark.parametrize(
    ("method", "options", "count"),
    [
        ("full", {}, 859_520_964),
        ("attention", {}, 93_536_640),
        # Table 4 of Dutt et al. (arXiv 2305.08252) counts the whole `attentions`: projections, norms and feed-forward too.
        ("attention", {"scope": "block"}, 267_239_360),
    ],
)
def test_stable_diffusion(method, options, count):
    assert medpeft.plan(_diffusion_unet(), method, **options).trainable == count


def test_the_attention_blocks_of_stable_diffusion_are_its_attentions_whole():
    sizes = {name: p.numel() for name, p in _diffusion_unet().named_parameters()}

    assert sum(size for name, size in sizes.items() if ".attentions." in name) == 267_239_360
    assert sum(size for name, size in sizes.items() if re.search(r"\.attn[12]\.", name)) == 93_536_640


def parts_of_a_fused_weight():
    """The change that a default LoRA makes to every fused qkv weight of every family, with the layout of its rows."""
    for family in (
        "vit",
        "beit",
        "eva02",
        "swin",
        "swinv2",
        "dinov2",
        "siglip",
        "clip_vision",
        "multihead_attention",
    ):
        model = make(family)
        medpeft.apply(model, "lora", rank=2, head=FAMILIES[family].head)
        randomise_adapters(model)
        before = {
            name: tensor.clone() for name, tensor in model.state_dict().items() if "adapters." not in name
        }
        with medpeft.merged(model):
            after = {name: model.state_dict()[name].clone() for name in before}
        changed = {
            name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])
        }
        yield family, changed


def test_lora_leaves_the_rows_of_the_keys_of_a_fused_weight_alone():
    for family, changed in parts_of_a_fused_weight():
        assert changed, family
        for name, change in changed.items():
            if name.startswith("attn_pool."):  # SigLIP pools by an attention with separate projections.
                assert name in ("attn_pool.q.weight", "attn_pool.kv.weight")
                change = torch.cat([changed["attn_pool.q.weight"], changed["attn_pool.kv.weight"]])
            query, key, value = change.chunk(3)
            assert name.endswith(("qkv.weight", "in_proj_weight", ".q.weight", ".kv.weight")), name
            assert not key.any(), (family, name)
            assert query.any(dim=1).all(), (family, name)
            assert value.any(dim=1).all(), (family, name)


def _heads_inside(attention, projected):
    """q, k and v as the attention's own forward splits them, from the output of its fused projection."""
    if hasattr(attention, "key_dim"):  # LeViT
        sizes = [attention.key_dim, attention.key_dim, attention.val_dim]
        return projected.view(*projected.shape[:2], attention.num_heads, -1).split(sizes, dim=3)
    heads, size = attention.num_heads, attention.dim_head * 3
    if isinstance(attention.qkv, nn.Conv2d):  # CoAtNet
        return projected.view(len(projected), heads, size, -1).chunk(3, dim=2)
    return projected.view(len(projected), -1, heads, size).chunk(3, dim=3)


@pytest.mark.parametrize("family", ["coatnet", "maxvit", "levit"])
def test_lora_changes_queries_and_values_where_the_heads_come_first(family):
    model = make(family)
    attentions = {n: m for n, m in model.named_modules() if isinstance(getattr(m, "qkv", None), nn.Module)}
    seen = {}
    for name, module in attentions.items():
        module.qkv.register_forward_hook(
            lambda layer, args, y, name=name: seen.setdefault(name, []).append((args[0], y.clone()))
        )
    medpeft.apply(model, "lora", rank=2)
    randomise_adapters(model)
    assert attentions
    assert all(getattr(m, "head_first", True) for m in attentions.values())

    for name, module in attentions.items():
        x = torch.randn(_input_of(model, family, name, seen), dtype=torch.float64)
        with medpeft.disabled(model):
            base = _heads_inside(module, module.qkv(x))
        adapted = _heads_inside(module, module.qkv(x))
        same = [torch.equal(a, b) for a, b in zip(adapted, base, strict=True)]
        assert same == [False, True, False], name


def _input_of(model, family, name, seen):
    if name not in seen:
        with torch.no_grad():
            model(example(family))
    return seen[name][0][0].shape


def test_rows_name_the_channels_of_each_head():
    assert Rows("q", 0, 2, groups=2).indices(12) == [0, 1, 6, 7]
    assert Rows("v", 4, 2, groups=2).indices(12) == [4, 5, 10, 11]


def test_every_attention_of_a_model_is_found_once():
    network = Network(make("vit"))

    assert list(network.attentions) == ["blocks.0.attn", "blocks.1.attn"]
    assert network.attention_blocks == {"blocks.0.attn": "blocks.0", "blocks.1.attn": "blocks.1"}
