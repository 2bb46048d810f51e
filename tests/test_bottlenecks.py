"""Bottlenecks and convolutions beside layers against their formulas in NumPy and float64, and where they begin."""

import copy

import numpy as np
import pytest
import timm
import torch
from models import make, randomise, randomise_adapters
from test_methods import GEOMETRIES, assert_computes, base_convolution, convolved, drawn
from torch import nn

import medpeft


def numbers(adapter):
    return {name.replace("bottleneck.", ""): value.detach().numpy() for name, value in adapter.named_parameters()}


def gelu(x):
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def relu(x):
    return np.maximum(x, 0)


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def through(p, x, act):
    """up(act(down(x))) of a bottleneck's numbers."""
    return act(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def block_and_adapters(family, method, **options):
    """An adapted model, a plain copy of its first block, and the numbers of that block's adapters by layer."""
    model = make(family)
    plain = copy.deepcopy(model.blocks[0])
    medpeft.apply(model, method, **options)
    randomise_adapters(model, size=0.3)
    found = {
        name: numbers(next(module.adapters.children()))
        for name, module in model.blocks[0].named_modules()
        if "adapters" in module._modules
    }
    return model, plain, found


@pytest.mark.parametrize("family", ["vit", "dinov2"])  # without and with LayerScale
def test_houlsby_in_a_block_written_out_by_hand(family):
    model, plain, p = block_and_adapters(family, "houlsby", bottleneck=3)
    x = drawn(2, 5, 16)

    with torch.no_grad():
        attended = plain.attn(plain.norm1(x)).numpy()
        attended += through(p["attn"], attended, gelu)
        stream = x + plain.ls1(torch.from_numpy(attended))
        found = plain.mlp(plain.norm2(stream)).numpy()
        found += through(p["mlp"], found, gelu)
        expected = (stream + plain.ls2(torch.from_numpy(found))).numpy()

    assert set(p) == {"attn", "mlp"}
    assert_computes(model.blocks[0], x, expected)


@pytest.mark.parametrize(("method", "act"), [("pfeiffer", relu), ("adapter_plus", gelu)])
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_adapters_after_a_block_written_out_by_hand(family, method, act):
    model, plain, p = block_and_adapters(family, method, bottleneck=3)
    x = drawn(2, 5, 16)

    with torch.no_grad():
        y = plain(x).numpy()
    scale = p[""].get("scale", 1.0)

    assert set(p) == {""}
    assert_computes(model.blocks[0], x, y + scale * through(p[""], y, act))


def test_the_drop_path_of_adapter_plus_leaves_out_whole_samples_in_training_alone():
    model, plain, p = block_and_adapters("vit", "adapter_plus", bottleneck=3, drop_path=0.5)
    x = drawn(64, 5, 16)
    with torch.no_grad():
        y = plain(x)
        change = torch.from_numpy(p[""]["scale"] * through(p[""], y.numpy(), gelu))
        torch.manual_seed(0)
        got = model.blocks[0].train()(x) - y

    kept = (got.abs() > 1e-12).all(dim=(1, 2))
    torch.testing.assert_close(got[kept], 2 * change[kept])
    assert (got[~kept] == 0).all()
    assert 16 < kept.sum() < 48


def test_a_convolutional_block_has_its_channels_first():
    model = medpeft.apply(make("coatnet"), "houlsby+pfeiffer+adapter_plus", target="stages.3.*")
    block = next(module for name, module in model.named_modules() if name == "stages.3.blocks.0")
    randomise_adapters(model, size=0.3)
    adapters = dict(block.adapters.items())
    y = drawn(2, 32, 3, 3)

    with torch.no_grad():
        got = adapters["pfeiffer"](y, y).numpy()

    expected = y.numpy() + np.moveaxis(through(numbers(adapters["pfeiffer"]), np.moveaxis(y.numpy(), 1, -1), relu), -1, 1)
    assert np.abs(got - expected).max() < 1e-12


def bypass(p, x, grid, prefix, scale):
    """Convpass on tokens, (B, N, D): patches on their grid, the tokens before them each as an image of one pixel."""
    hidden = quick_gelu(x @ p["down"].T + p["down_bias"])
    image = np.moveaxis(hidden[:, prefix:].reshape(len(x), *grid, -1), -1, 1)
    convolved_image = convolved(image, p["conv"], padding=1) + p["conv_bias"][:, None, None]
    patches = np.moveaxis(convolved_image, 1, -1).reshape(len(x), grid[0] * grid[1], -1)
    alone = [
        (convolved(hidden[:, i, :, None, None], p["conv"], padding=1)[..., 0, 0] + p["conv_bias"])[:, None]
        for i in range(prefix)
    ]
    hidden = quick_gelu(np.concatenate([*alone, patches], 1))
    return scale * (hidden @ p["up"].T + p["up_bias"])


@pytest.mark.parametrize(("family", "prefix"), [("vit", 1), ("deit_distilled", 2)])
def test_convpass_in_a_block_written_out_by_hand(family, prefix):
    model, plain, p = block_and_adapters(family, "convpass", bottleneck=3, scale=0.5)
    x = drawn(2, prefix + 16, 16)

    with torch.no_grad():
        normed = plain.norm1(x)
        stream = x + plain.attn(normed) + torch.from_numpy(bypass(p["attn"], normed.numpy(), (4, 4), prefix, 0.5))
        normed = plain.norm2(stream)
        expected = stream + plain.mlp(normed) + torch.from_numpy(bypass(p["mlp"], normed.numpy(), (4, 4), prefix, 0.5))

    assert_computes(model.blocks[0], x, expected.numpy())


def test_convpass_beside_the_attention_alone():
    model = medpeft.apply(make("vit"), "convpass", beside="attention")

    assert [name for name, module in model.named_modules() if name.endswith("adapters")] == [
        "blocks.0.attn.adapters",
        "blocks.1.attn.adapters",
    ]


def test_convpass_refuses_an_attention_that_pools_its_tokens():
    adapter = medpeft.apply(make("vit"), "convpass").blocks[0].attn.adapters["convpass"]
    x = torch.randn(1, 4, 4, 16, dtype=torch.float64)

    assert adapter(x, x).shape == x.shape
    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0\.attn makes \(1, 2, 2, 16\) of \(1, 4, 4, 16\): it pools"):
        adapter(x, x[:, ::2, ::2])


def test_convpass_takes_the_grid_of_an_oblong_image_from_the_model():
    options = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3}
    model = randomise(timm.create_model("vit_tiny_patch16_224", img_size=(16, 32), **options).double()).eval()
    medpeft.apply(model, "convpass", bottleneck=3, beside="attention")
    randomise_adapters(model)
    adapter = model.blocks[0].attn.adapters["convpass"]
    x, y = drawn(2, 9, 16), drawn(2, 9, 16)

    with torch.no_grad():
        change = (adapter(x, y) - y).numpy()

    assert np.abs(change - bypass(numbers(adapter), x.numpy(), (2, 4), 1, 1.0)).max() < 1e-12


def test_convpass_says_so_where_tokens_make_no_grid():
    options = {"patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3, "dynamic_img_size": True}
    model = medpeft.apply(timm.create_model("vit_tiny_patch16_224", img_size=32, **options), "convpass")

    with pytest.raises(medpeft.MedpeftError, match=r"'convpass' finds no grid in the 9 tokens of blocks\.0\.attn"):
        model(torch.zeros(1, 3, 16, 32))


def test_convpass_convolves_volumes_in_three_directions():
    from monai.networks.nets import ViT

    model = ViT(1, (16,) * 3, (8,) * 3, hidden_size=16, mlp_dim=32, num_layers=1, num_heads=2, classification=True)
    randomise_adapters(medpeft.apply(randomise(model.double()).eval(), "convpass", bottleneck=3))
    adapter = model.blocks[0].attn.adapters["convpass"]
    hidden = drawn(1, 9, 3)

    with torch.no_grad():
        got = adapter._convolved(hidden)
        image = hidden[:, 1:].unflatten(1, (2, 2, 2)).movedim(-1, 1)
        expected = nn.functional.conv3d(image, adapter.conv, adapter.conv_bias, padding=1).flatten(2).mT

    assert adapter.conv.shape == (3, 3, 3, 3, 3)
    torch.testing.assert_close(got[:, 1:], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(got[:, 0], hidden[:, 0] @ adapter.conv[:, :, 1, 1, 1].T + adapter.conv_bias)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_conv_adapter_beside_a_convolution(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "conv_adapter", reduction=2)

    slides = {"stride": conv.stride[0], "padding": conv.padding[0], "dilation": conv.dilation[0]}
    hidden = relu(convolved(x.numpy(), p["down"], groups=2, **slides))
    change = p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden)
    assert p["down"].shape == (2, 2, *conv.kernel_size)
    assert_computes(model, x, base_convolution(conv, x) + change)


def test_conv_adapter_after_a_convolution():
    conv, x = nn.Conv2d(4, 8, 3, stride=2, padding=2, dilation=2), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "conv_adapter", reduction=4, form="sequential")

    y = base_convolution(conv, x)
    hidden = relu(convolved(y, p["down"], padding=1, groups=2))
    assert p["down"].shape == (2, 4, 3, 3)
    assert_computes(model, x, y + p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden))


@pytest.mark.parametrize("size", [7, 8])
def test_conv_adapter_pads_by_the_size_of_its_input_as_its_host_does(size):
    from timm.layers import Conv2dSame

    conv, x = Conv2dSame(4, 4, 3, stride=2), drawn(2, 4, size, size)
    model, _, p = applied_at(conv, "conv_adapter", reduction=1)
    twin = Conv2dSame(4, 4, 3, stride=2, groups=4, bias=False).double()

    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(p["down"]))
        hidden = twin(x).relu().numpy()
        y = medpeft.remove(copy.deepcopy(model))(x).numpy()
    assert_computes(model, x, y + p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden))


def applied_at(layer, method, **options):
    """As `applied`, for a method whose sites would be the residual blocks'."""
    model = nn.Sequential(layer).double().eval()
    randomise(model)
    medpeft.apply(model, method, head=None, target="*", **options)
    randomise_adapters(model, size=0.3)
    (adapter,) = layer.adapters.children()
    return model, adapter, numbers(adapter)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_residual_adapter_in_parallel_is_a_1x1_convolution_of_the_input(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "residual_adapter")

    beside = convolved(x.numpy(), p["alpha"][..., None, None], conv.stride[0], groups=conv.groups)
    assert_computes(model, x, base_convolution(conv, x) + beside)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_residual_adapter_in_series_is_a_1x1_convolution_of_the_output(geometry):
    conv, x = nn.Conv2d(4, 8, **geometry), drawn(2, 4, 7, 9)
    model, _, p = applied_at(conv, "residual_adapter", form="series")

    y = base_convolution(conv, x)
    assert_computes(model, x, y + np.einsum("oi,nihw->nohw", p["alpha"], y))


def test_by_themselves_residual_adapters_take_the_3x3_convolutions_of_the_residual_blocks():
    model = medpeft.apply(make("resnet"), "residual_adapter")

    adapted = [name for name, module in model.named_modules() if "adapters" in module._modules]
    assert adapted == [f"layer{i}.0.conv2" for i in (1, 2, 3, 4)]


ONE_SIDE = [
    ("vit", "houlsby", ("down", "up")),
    ("vit", "pfeiffer", ("down", "up")),
    ("vit", "adapter_plus", ("down", "up")),
    ("vit", "convpass", ("down", "up")),
    ("resnet", "conv_adapter", ("down", "up")),
]


@pytest.mark.parametrize(("family", "method", "sides"), ONE_SIDE)
def test_exactly_one_of_the_two_matrices_starts_at_zero_so_that_both_learn(family, method, sides):
    model = medpeft.apply(make(family), method)
    matrices = {n: p for n, p in model.named_parameters() if ".adapters." in n and n.rpartition(".")[2] in sides}
    zero = {name for name, p in matrices.items() if not p.any()}
    optimizer = torch.optim.SGD(medpeft.parameter_groups(model, lr=1.0))

    for _ in range(2):  # After the first step no matrix is zero, and every one gets a gradient.
        optimizer.zero_grad()
        model(drawn(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()

    assert zero == {name for name in matrices if name.endswith(sides[1])}
    assert all(p.grad.any() for p in matrices.values())


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "adapter_plus"])
def test_the_official_initialisation_draws_both_matrices_within_two_deviations(method):
    model = medpeft.apply(make("vit"), method, init="official", bottleneck=64)

    for name, p in model.named_parameters():
        if name.endswith((".down", ".up")):
            assert p.abs().max() <= 0.02
            assert 0.0082 < p.std() < 0.0094  # 0.01, and 0.0088 once the tails are cut off


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("houlsby", {"bottleneck": 0}, "bottleneck=0 must be a whole number above 0"),
        ("pfeiffer", {"init": "zero"}, "init='zero' is not known: choose one of 'identity', 'official'"),
        ("adapter_plus", {"drop_path": 1.0}, "drop_path=1.0 is no probability below 1"),
        ("convpass", {"beside": "mlp"}, "beside='mlp' is not known"),
    ],
)
def test_options_that_make_no_sense_are_refused(method, options, message):
    with pytest.raises(medpeft.MedpeftError, match=message):
        medpeft.apply(make("vit"), method, **options)


@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "adapter_plus", "convpass"])
def test_merging_is_refused_with_the_reason(method):
    model = medpeft.apply(make("vit"), method)

    with pytest.raises(medpeft.MedpeftError, match=r"blocks\.0.*: there (is a|are two) nonlinearit"):
        medpeft.merge(model)


def test_branches_of_two_modules_are_adapted_before_they_meet_the_residual_stream():
    class SelfOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(8, 4)

        def forward(self, hidden, stream):
            return self.dense(hidden) + stream

    class LayerIntermediate(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = nn.Linear(4, 8)

        def forward(self, x):
            return self.dense(x).relu()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.layernorm_after = nn.LayerNorm(4)
            self.intermediate = LayerIntermediate()
            self.output = SelfOutput()

        def forward(self, x):
            x = x + self.attention(x, x, x)[0]
            return self.output(self.intermediate(self.layernorm_after(x)), x)

    model = nn.Sequential(Block())

    planned = medpeft.plan(model, "houlsby", head=None, bottleneck=2)
    assert [site.name for _, site in planned.sites] == ["0.attention", "0.output.dense"]
    assert [site.name for _, site in medpeft.plan(model, "convpass", head=None).sites] == ["0.attention"]
    with pytest.raises(medpeft.MedpeftError, match=r"0\.output\.dense is the second half of an MLP"):
        medpeft.plan(model, "convpass", head=None, target="*.dense")
    assert medpeft.check(medpeft.apply(model, "houlsby", head=None, bottleneck=2), torch.randn(2, 3, 4)).tensors == 8


def test_a_sequential_mlp_runs_as_before_with_adapters_in_it():
    model, x = make("torchvision_vit"), drawn(2, 3, 32, 32)
    with torch.no_grad():
        base = model(x)
        assert torch.equal(medpeft.apply(model, "houlsby")(x), base)
    assert isinstance(model.encoder.layers[0].mlp, nn.Sequential)
    assert "adapters" in model.encoder.layers[0].mlp._modules


@pytest.mark.parametrize("method", ["pfeiffer", "adaptformer"])
@pytest.mark.parametrize("kind", [0, 1], ids=["spatial", "channel"])
def test_a_block_may_have_its_channels_first_though_its_mlp_has_them_last(method, kind):
    sizes = {"depths": (1, 1), "embed_dims": (8, 8), "num_heads": (2, 2), "num_classes": 3, "window_size": 2}
    model = randomise(timm.create_model("davit_tiny", **sizes).double()).eval()
    block = dict(model.named_modules())[f"stages.0.blocks.0.{kind}"]
    plain, x, seen = copy.deepcopy(block), drawn(2, 8, 4, 4), {}
    plain.norm2.register_forward_pre_hook(lambda layer, args: seen.update(stream=args[0]))
    randomise_adapters(medpeft.apply(model, method, bottleneck=3, target="stages.0.*"), size=0.3)
    p = numbers(block.adapters[method])

    with torch.no_grad():
        y = plain(x)
        stream = y.movedim(1, -1) if method == "pfeiffer" else seen["stream"].view(2, 4, 4, 8)
        change = through(p, stream.numpy(), relu) * (1.0 if method == "pfeiffer" else 0.1)

    assert_computes(block, x, y.numpy() + np.moveaxis(change, -1, 1))


def test_convpass_knows_the_class_token_of_each_row_of_blocks():
    with torch.device("meta"):
        model = timm.create_model("crossvit_9_240")

    assert {site.layout.prefix for _, site in medpeft.plan(model, "convpass").sites} == {1}
