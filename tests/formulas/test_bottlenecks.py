"""Bottlenecks after layers and blocks against their formulas in NumPy and float64, and where they begin."""

import copy

import numpy as np
import pytest
import timm
import torch
from by_hand import block_and_adapters, gelu, numbers, relu, through
from layer_oracles import assert_computes, drawn
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft


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


@pytest.mark.parametrize(
    ("batch_first", "shape"), [(True, (64, 5, 8)), (False, (5, 64, 8)), (False, (64, 8))]
)
def test_the_drop_path_of_adapter_plus_knows_the_batch_where_it_comes_second_and_where_there_is_none(
    batch_first, shape
):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
            self.mlp = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

        def forward(self, x):
            return x

    model = nn.Sequential(Block()).double().train()
    randomise_adapters(medpeft.apply(model, "adapter_plus", head=None, drop_path=0.5), size=0.3)
    x = drawn(*shape)
    with torch.no_grad():
        change = model(x) - x

    dropped = (change == 0).all(-1)
    if len(shape) == 2:
        assert dropped.all() or not dropped.any()
    else:
        of_samples = dropped.all(0 if not batch_first else 1)
        assert 16 < of_samples.sum() < 48
        assert dropped.sum() == 5 * of_samples.sum()


def test_a_convolutional_block_has_its_channels_first():
    model = medpeft.apply(make("coatnet"), "houlsby+pfeiffer+adapter_plus", target="stages.3.*")
    block = next(module for name, module in model.named_modules() if name == "stages.3.blocks.0")
    randomise_adapters(model, size=0.3)
    adapters = dict(block.adapters.items())
    y = drawn(2, 32, 3, 3)

    with torch.no_grad():
        got = adapters["pfeiffer"](y, y).numpy()

    expected = y.numpy() + np.moveaxis(
        through(numbers(adapters["pfeiffer"]), np.moveaxis(y.numpy(), 1, -1), relu), -1, 1
    )
    assert np.abs(got - expected).max() < 1e-12


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
    matrices = {
        n: p for n, p in model.named_parameters() if ".adapters." in n and n.rpartition(".")[2] in sides
    }
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
        ("adapter_plus", {"drop_path": 1.0}, "drop_path=1.0 must be at least 0 and below 1"),
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
    assert (
        medpeft.check(medpeft.apply(model, "houlsby", head=None, bottleneck=2), torch.randn(2, 3, 4)).tensors
        == 8
    )


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
