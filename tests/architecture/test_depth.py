"""Depth: which places lie in the last share of a model's blocks, and that backward stops before the first of them."""

import pytest
import torch
from models import FAMILIES, example, make, output, randomise_adapters
from tiny_places import Transformer
from torch import Tensor, nn
from traces import same, tensors, trace

import medpeft
from medpeft.architecture.layers import kind_of
from medpeft.architecture.network import Network

# The first layer in the last quarter, and the last one before it.
BORDERS = {
    "vit": ("blocks.1.norm1", "blocks.0.mlp.fc2"),
    "swin": ("layers.1.blocks.1.norm1", "layers.1.blocks.0.mlp.fc2"),
    "convnext": ("stages.3.blocks.0.conv_dw", "stages.3.downsample.1"),
    "resnet": ("layer4.0.conv1", "layer3.0.downsample.1"),
    "torchvision_resnet": ("layer4.0.conv1", "layer3.0.downsample.1"),
    "densenet": ("features.denseblock3.denselayer1.norm1", "features.transition2.conv"),
    "efficientnet": ("blocks.5.0.conv_pw", "blocks.4.0.bn3"),
    "torchvision_vit": ("encoder.layers.encoder_layer_1.ln_1", "encoder.layers.encoder_layer_0.mlp.3"),
    "hf_vit": ("vit.layers.1.attention.q_proj", "vit.layers.0.mlp.fc2"),
    "hf_convnext": (
        "convnext.encoder.stages.1.layers.0.dwconv",
        "convnext.encoder.stages.1.downsampling_layer.1",
    ),
    "clip_vision": ("transformer.resblocks.1.ln_1", "transformer.resblocks.0.mlp.c_proj"),
    "monai_unet2d": ("model.1.submodule.2.1.conv.unit0.conv", "model.1.submodule.2.0.adn.N"),
    "monai_swin_unetr": ("decoder4.transp_conv.conv", "decoder5.conv_block.norm3"),
    "diffusion_unet": ("unet.up_blocks.0.resnets.0.norm1", "unet.mid_block.resnets.1.conv2"),
}


def network(family, depth=0.25):
    model = make(family)
    head = medpeft.plan(model, "full", head=FAMILIES[family].head).record.head
    return Network(model, head, depth)


@pytest.mark.parametrize("family", BORDERS)
def test_the_last_quarter_begins_at_a_block_and_has_all_that_follows(family):
    inside, before = [], []
    quarter = network(family)
    for name, module in quarter.modules.items():
        if kind_of(module):
            (inside if quarter.in_depth(name) else before).append(name)
    assert (inside[0], before[-1]) == BORDERS[family]
    for name in quarter.head:
        assert quarter.in_depth(name)


def outputs_with_gradients(model, x):
    """Names of the layers whose output asks for a gradient."""
    names = set()

    def note(name):
        def hook(module, inputs, y):
            if isinstance(y, Tensor) and y.requires_grad:
                names.add(name)

        return hook

    for name, module in model.named_modules():
        if kind_of(module):
            module.register_forward_hook(note(name))
    output(model.train(), x)
    return names


@pytest.mark.parametrize("method", ["ssf", "full"])
@pytest.mark.parametrize("family", BORDERS)
def test_autograd_keeps_nothing_of_what_lies_before(family, method):
    model, x = make(family), example(family)
    quarter = network(family)
    medpeft.apply(model, method, depth=0.25, head=FAMILIES[family].head)
    with_gradients = outputs_with_gradients(model, x)
    assert with_gradients
    for name in with_gradients:
        assert quarter.in_depth(name), name


@pytest.mark.parametrize("method", ["lora", "bias", "tsa", "ssf", "svdiff", "full"])
def test_half_of_a_resnet_is_saved_loaded_checked_merged_and_removed(method, tmp_path):
    model, x = make("resnet"), example("resnet")
    before, about = tensors(model), trace(model)
    medpeft.apply(model, method, depth=0.5, keep_base=True)
    randomise_adapters(model)
    assert medpeft.check(model, x)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    for name in trained:
        assert name.startswith(("layer3.", "layer4.", "fc.", "adapters.")), name

    medpeft.save(model, tmp_path / "half.safetensors")
    loaded = medpeft.load(make("resnet"), tmp_path / "half.safetensors")
    adapted = output(model.eval(), x)
    assert torch.equal(output(loaded.eval(), x), adapted)
    assert medpeft.inspect(tmp_path / "half.safetensors").document["depth"] == 0.5
    with medpeft.merged(loaded):
        torch.testing.assert_close(output(loaded, x), adapted, rtol=1e-10, atol=1e-10)
    medpeft.remove(model)
    assert same(tensors(model), before)
    assert trace(model) == about


def test_statistics_adapt_in_the_depth_alone():
    model, x = make("resnet"), example("resnet")
    medpeft.apply(model, "full", depth=0.25)
    before = tensors(model)
    output(model.train(), x)
    changed = {name for name, tensor in tensors(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    for name in changed:
        assert name.startswith("layer4.")
    assert changed == set(medpeft.adapters.record.applied(model).statistics)


def test_tokens_of_shallow_prompts_enter_at_the_first_block_in_depth():
    model = nn.Sequential(Transformer(depth=4))
    sites = medpeft.plan(model, "vpt_shallow", depth=0.5, head=None).record.sites
    assert sites == [("vpt_shallow", "0.blocks.2", "")]


@pytest.mark.parametrize(
    ("depth", "blocks"), [(1.0, 4), (1, 4), (0.75, 3), (0.6, 2), (0.5, 2), (0.3, 1), (0.01, 1), (1e-300, 1)]
)
def test_depth_is_rounded_to_whole_blocks_and_has_at_least_one(depth, blocks):
    model = nn.Sequential(Transformer(depth=4))
    planned = medpeft.plan(model, "lora", depth=depth, head=None)
    layers = [f"0.blocks.{4 - blocks + i}.attn.qkv" for i in range(blocks)]
    assert [name for _, name, _ in planned.record.sites] == layers


def test_depth_is_joined_with_target_and_exclude():
    model = nn.Sequential(Transformer(depth=4))
    choice = {"target": "mlp", "exclude": "*.3.mlp.fc1", "depth": 0.5, "head": None}
    planned = medpeft.plan(model, "lora", **choice)
    assert [name for _, name, _ in planned.record.sites] == [
        "0.blocks.2.mlp.fc1",
        "0.blocks.2.mlp.fc2",
        "0.blocks.3.mlp.fc2",
    ]
    with pytest.raises(medpeft.MedpeftError, match=r"target='\*\.0\.mlp', depth=0\.5"):
        medpeft.plan(model, "lora", target="*.0.mlp", depth=0.5, head=None)


def test_a_model_without_known_blocks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(medpeft.MedpeftError, match=r"in Sequential none is known .* pass target"):
        medpeft.apply(model, "lora", target="0", depth=0.5, head="1")
    assert medpeft.apply(model, "lora", target="0", depth=1.0, head="1") is model


@pytest.mark.parametrize("depth", [0, -0.5, 1.5, True, "0.5", None, float("nan"), float("inf"), [0.5]])
def test_a_depth_that_is_no_share_is_refused(depth):
    with pytest.raises(medpeft.MedpeftError, match=r"depth=.* must be a number above 0 and at most 1"):
        medpeft.plan(make("vit"), "lora", depth=depth)


def test_plan_and_report_say_the_depth():
    model = make("vit")
    assert str(medpeft.plan(model, "lora", depth=0.5)).startswith("lora on VisionTransformer, depth 0.5\n")
    report = medpeft.report(medpeft.apply(model, "lora", depth=0.5))
    assert report.depth == 0.5
    assert str(report).startswith("lora on VisionTransformer, depth 0.5\n")
    assert "depth" not in str(medpeft.plan(make("vit"), "lora"))


def test_a_list_beside_the_stages_and_an_embedding_registered_last_lie_before_the_last_blocks():
    model = nn.Module()
    model.blocks = Transformer(depth=4).blocks
    model.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
    model.words, model.norm = nn.Embedding(3, 8), nn.LayerNorm(8)
    planned = medpeft.plan(model, "norm", depth=0.25, head=None)
    assert {name.rpartition(".")[0] for name in planned.selected} == {
        "blocks.3.norm1",
        "blocks.3.norm2",
        "norm",
    }
