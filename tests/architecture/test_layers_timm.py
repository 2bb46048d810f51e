"""What the layers of timm's models are: the parts of fused projections, class blocks, heads, and what is overwritten."""

from pathlib import Path

import pytest
import timm
import torch
from timm.layers import AttentionPoolLatent
from timm.layers.attention2d import MultiQueryAttention2d
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.lambda_layer import LambdaLayer
from timm.models import (
    cait,
    convit,
    efficientformer,
    efficientformer_v2,
    efficientvit_mit,
    efficientvit_msra,
    gcvit,
    levit,
    lowformer,
    maxxvit,
    mobilevit,
    pvt_v2,
    shvit,
    swin_transformer,
    tiny_vit,
    twins,
    vision_transformer,
    xcit,
)
from torch import nn

import medpeft
from medpeft.architecture import attention, fused
from medpeft.architecture import layers as roles
from medpeft.architecture.head import find_head
from medpeft.architecture.weight_reads import overwrites

IMAGE, TOKENS = (1, 8, 4, 4), (1, 16, 8)
# Without an activation between attention and output, which is then linear in the values.
LAYOUTS = {
    "ViT": (lambda: vision_transformer.Attention(8, num_heads=2), TOKENS),
    "ViT-22B": (lambda: vision_transformer.ParallelScalingBlock(8, num_heads=2), TOKENS),
    "Swin": (lambda: swin_transformer.WindowAttention(8, 2, window_size=(4, 4)), TOKENS),
    "GCViT": (lambda: gcvit.WindowAttentionGlobal(8, 2, (4, 4), use_global=False), TOKENS),
    "CoAtNet": (lambda: maxxvit.Attention2d(8, dim_head=4, head_first=True), IMAGE),
    "CoAtNet, parts first": (lambda: maxxvit.Attention2d(8, dim_head=4, head_first=False), IMAGE),
    "MaxViT": (lambda: maxxvit.AttentionCl(8, dim_head=4, head_first=True), TOKENS),
    "LeViT": (
        lambda: levit.Attention(
            8, key_dim=2, num_heads=2, attn_ratio=2.0, resolution=4, act_layer=nn.Identity
        ),
        TOKENS,
    ),
    "LeViT, downsampling": (
        lambda: levit.AttentionDownsample(
            8, 8, 2, num_heads=2, attn_ratio=3.0, resolution=4, act_layer=nn.Identity
        ),
        TOKENS,
    ),
    "EfficientFormer": (
        lambda: efficientformer.Attention(8, key_dim=2, num_heads=2, attn_ratio=3, resolution=4),
        TOKENS,
    ),
    "TinyViT": (lambda: tiny_vit.Attention(8, 2, num_heads=2, attn_ratio=3, resolution=(4, 4)), TOKENS),
    "HaloNet": (lambda: HaloAttn(8, dim_head=2, num_heads=2, block_size=2, halo_size=1), IMAGE),
    "BoTNet": (lambda: BottleneckAttn(8, feat_size=(4, 4), dim_head=2, num_heads=2), IMAGE),
    "LambdaNet": (lambda: LambdaLayer(8, feat_size=(4, 4), dim_head=3, num_heads=2), IMAGE),
    "PVT": (lambda: pvt_v2.Attention(8, num_heads=2, sr_ratio=1), TOKENS, [4, 4]),
    "ConViT": (lambda: convit.GPSA(8, num_heads=2), TOKENS),
    "MobileNetV4": (lambda: MultiQueryAttention2d(8, num_heads=2, key_dim=4), IMAGE),
    "EfficientFormerV2": (
        lambda: efficientformer_v2.Attention2dDownsample(8, 3, 2, resolution=4, act_layer=nn.Identity),
        IMAGE,
    ),
    "LowFormer": (lambda: lowformer.ConvAttention(64, head_dim_mul=1.0), (1, 64, 8, 8)),
    "EfficientViT (MIT)": (lambda: efficientvit_mit.LiteMLA(8, 8, dim=4, scales=()), IMAGE),
    "SHViT": (lambda: without_activation(shvit.SHSA(8, qk_dim=3, pdim=5)), IMAGE),
}


def without_activation(layer):
    layer.proj[0] = nn.Identity()
    return layer


def randomised(layer):
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    layer.double().eval()  # LeViT's `eval` returns nothing
    return layer


def changed_by(layer, path, row, inputs, step):
    """How the output changes if one channel of a projection's output is raised at one location."""

    def raise_one(module, args, y):
        channels = y.movedim(1, -1) if roles.is_conv(module) else y
        raised = channels.clone()
        raised[(*(size // 2 for size in channels.shape[:-1]), row)] += step
        return raised.movedim(-1, 1) if roles.is_conv(module) else raised

    handle = layer.get_submodule(path).register_forward_hook(raise_one)
    try:
        return layer(*inputs).detach()
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", LAYOUTS)
def test_queries_act_locally_and_values_linearly(kind):
    build, shape, *more = LAYOUTS[kind]
    torch.manual_seed(0)
    layer = randomised(build())
    inputs = (torch.randn(shape, dtype=torch.float64), *more)
    before = layer(*inputs).detach()
    channels = 1 if before.ndim == 4 else -1
    reach = {part: [] for part in "qkv"}
    for projection in attention.projections(layer):
        size = layer.get_submodule(projection.path).weight.shape[0]
        rows = {r.part: r.indices(size) for r in projection.rows} or {projection.part: range(size)}
        for part in set(rows) - {"o"}:
            for row in rows[part]:
                # Far enough to get above zero where the keys go through a ReLU.
                once, twice = (
                    changed_by(layer, projection.path, row, inputs, step) - before for step in (8.0, 16.0)
                )
                linear = torch.allclose(twice, 2 * once, rtol=1e-6, atol=1e-6 * float(once.abs().max()))
                assert part == "q" or linear is (part == "v"), (
                    f"channel {row} of {projection.path} is not of {part}"
                )
                reach[part].append(int((once.abs().amax(channels) > 1e-9).sum()))
    assert all(reach.values())
    assert max(reach["q"]) < min(reach["k"])


def test_the_rows_of_a_fused_projection_are_each_in_one_part():
    for kind, (build, *_) in LAYOUTS.items():
        layer = build()
        for projection in attention.projections(layer):
            taken = [
                i
                for row in projection.rows
                for i in row.indices(layer.get_submodule(projection.path).weight.shape[0])
            ]
            assert len(taken) == len(set(taken)), kind


def test_every_row_of_the_table_of_fused_layouts_is_that_of_some_attention_and_links_to_its_source():
    layers = [build() for build, *_ in LAYOUTS.values()]
    layers.append(mobilevit.MobileVitV2Block(8, transformer_dim=6, transformer_depth=1).transformer[0].attn)
    layers.append(gcvit.WindowAttentionGlobal(8, 2, (4, 4), use_global=True))
    used = [next(row for row in fused.FUSED_LAYOUTS if row.fits(layer)) for layer in layers]

    for row in fused.FUSED_LAYOUTS:
        assert row in used, row.families
        file = row.link.partition("/timm/")[2]
        assert (Path(timm.__file__).parent / file).is_file(), row.link


def test_mobilevit_v2_has_one_query_channel():
    layer = mobilevit.MobileVitV2Block(8, transformer_dim=6, transformer_depth=1).transformer[0].attn
    (fused, _) = attention.projections(layer)
    assert [(row.part, row.start, row.size) for row in fused.rows] == [("q", 0, 1), ("k", 1, 6), ("v", 7, 6)]


def test_each_head_of_a_cascade_has_a_projection_of_its_own():
    layer = efficientvit_msra.CascadedGroupAttention(
        8, key_dim=2, num_heads=2, attn_ratio=2.0, resolution=4, kernels=(3, 3)
    )
    found = [p for p in attention.projections(layer) if p.rows]
    assert [p.path for p in found] == ["qkvs.0.conv", "qkvs.1.conv"]
    assert [[(row.part, row.start, row.size, row.groups) for row in p.rows] for p in found] == [
        [("q", 0, 2, 1), ("k", 2, 2, 1), ("v", 4, 4, 1)]
    ] * 2


def test_global_queries_leave_keys_and_values_in_the_projection():
    layer = gcvit.WindowAttentionGlobal(8, 2, (4, 4), use_global=True)
    fused = attention.projections(layer)[0]
    assert [(row.part, row.start, row.size) for row in fused.rows] == [("k", 0, 8), ("v", 8, 8)]


def test_attention_pools_and_class_attentions_have_their_projections():
    assert [p.parts for p in attention.projections(AttentionPoolLatent(8, num_heads=2))] == ["kv", "q", "o"]
    assert [p.parts for p in attention.projections(cait.ClassAttn(8, num_heads=2))] == ["q", "k", "v", "o"]


def test_a_fused_projection_of_unknown_layout_is_no_projection():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.num_heads = nn.Linear(8, 25), 2

    assert attention.projections(Odd()) == []


def test_an_adapter_beside_a_class_block_changes_the_class_token_alone():
    block = randomised(xcit.ClassAttentionBlock(8, 2))
    model = medpeft.apply(nn.Sequential(block, nn.Linear(8, 2)).eval(), "adaptformer", head="1", bottleneck=4)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    before = model[0](x)
    nn.init.normal_(next(model[0].adapters.children()).up)
    changed = (model[0](x) - before).abs().amax((0, 2))
    assert changed[0] > 1e-3
    assert torch.equal(changed[1:], torch.zeros(4, dtype=torch.float64))


def test_adaptformer_is_not_offered_blocks_of_two_streams():
    with torch.device("meta"):
        model = timm.create_model("tnt_s_patch16_224", depth=1)
    with pytest.raises(medpeft.MedpeftError, match="'adaptformer' found nothing to train in TNT"):
        medpeft.plan(model, "adaptformer")


def test_a_second_classifier_that_timm_does_not_list_belongs_to_the_head():
    with torch.device("meta"):
        model = timm.create_model("volo_d1_224", num_classes=3)
    assert set(find_head(model)) == {"head", "aux_head"}


def test_ssf_keeps_outputs_where_the_source_changes_them_in_place():
    class Positioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.position, self.head = twins.PosConv(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.position(x, (2, 2)))

    model = medpeft.apply(Positioned(), "ssf", head="head")
    model(torch.randn(1, 4, 4)).sum().backward()
    gradient = model.position.proj[0].adapters["ssf"].scale.grad
    assert torch.isfinite(gradient).all()
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    ("arch", "overwrites_inputs"),
    [("test_vit", []), ("test_convnext", []), ("twins_svt_small", ["PosConv"]), ("resnet18", ["BasicBlock"])],
)
def test_in_place_operations_are_found_in_the_source(arch, overwrites_inputs):
    with torch.device("meta"):
        modules = timm.create_model(arch).modules()
    found = {type(m).__name__ for m in modules if overwrites(type(m)) and not roles.is_norm(m)}
    assert sorted(found) == overwrites_inputs
