"""LoRA under every option of it: the combined weights and biases are what `combine` says."""

import copy

import pytest
import torch
from combined import changes, require_sum, trained
from models import make

import medpeft
from medpeft.architecture.rows import part_sizes, take_rows
from medpeft.combining.changes import Recipe

IMAGES = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
RANKS = {"blocks.0": 1, "*": 2}
OPTIONS = {
    "alpha": ({"alpha": 5.0}, {"alpha": 3.0}),
    "rslora": ({"rslora": True}, {"rank": 3}),
    "bias": ({"bias": True, "alpha": 6.0}, {"bias": True, "rslora": True}),
    "bias of all channels": ({"bias": True, "target": "mlp"}, {"bias": True, "target": "mlp"}),
    "freeze_a": ({"freeze_a": True}, {}),
    "gaussian": ({"init": "gaussian"}, {"init": "orthogonal"}),
    "pissa": ({"init": "pissa"}, {"init": "pissa", "alpha": 3.0}),
    "olora": ({"init": "olora", "bias": True}, {"bias": True}),
    "eva": ({"init": "eva", "data": [IMAGES]}, {}),
    "parts": ({"parts": "kvo"}, {"parts": "kvo", "rank": 3}),
    "by place": (
        {"rank": RANKS, "bias": {"blocks.0": True}},
        {"rank": {"*.1.*": 4, "*": 2}, "alpha": {"blocks.0": 3}, "bias": {"blocks.0": True}},
    ),
}


def two(option):
    """A base, the bytes of two files of it, and the models that they were made of."""
    base, files, models = make("vit").double(), [], []
    for seed, options in enumerate(OPTIONS[option], 1):
        file, model = trained(base, "lora", seed, seed=seed, **{"rank": 2, "head": None, **options})
        files.append(file)
        models.append(model)
    return base, files, models


@pytest.mark.parametrize("option", OPTIONS)
def test_a_sum_is_exact_under_every_option(option):
    base, files, models = two(option)
    model = copy.deepcopy(base)
    assert medpeft.combine(model, dict(zip(files, (0.7, -0.4), strict=True))).error == 0
    require_sum(model, base, models, (0.7, -0.4))


@pytest.mark.parametrize("how", ["ties", "dare"])
@pytest.mark.parametrize("option", OPTIONS)
def test_ties_and_dare_act_on_the_changes_of_every_part(option, how):
    base, files, models = two(option)
    model, recipe = copy.deepcopy(base), Recipe(how, (0.7, 0.4), 0.5, 3)
    weights = dict(zip(files, recipe.weights, strict=True))
    report = medpeft.combine(model, weights, how=how, rank=16, density=0.5, seed=3)
    assert report.error < 1e-9  # The rank is that of the whole layer.
    found, of_models = changes(model, base), [changes(other, base) for other in models]
    for name, adapter in model.named_modules():
        if not name.endswith(".adapters.lora"):
            continue
        layer, rows = name.removesuffix(".adapters.lora"), adapter.rows
        for key, tensor in (("weight", "{}"), ("bias", "bias")):
            channels = f"{layer}.{key}"
            own = [take_rows(of_model[channels], rows) for of_model in of_models]
            ours = take_rows(found[channels], rows)
            sizes = part_sizes(rows, len(ours)) if key == "weight" else [len(ours)]
            pieces = zip(ours.split(sizes), *(other.split(sizes) for other in own), strict=True)
            for number, (piece, *others) in enumerate(pieces):
                expected = recipe.combine(f"{name}.{tensor.format(number)}", others)
                assert torch.allclose(piece, expected, rtol=1e-9, atol=1e-12), (channels, number)
        assert (adapter.bias is not None) == bool(own[0].any())


def test_layers_that_are_not_cut_count_in_what_the_rank_leaves_out():
    base = make("vit").double()
    options = {"rank": {"blocks.0": 1, "*": 3}, "target": "mlp", "head": None}
    file, trained_model = trained(base, "lora", 1, **options)
    model = copy.deepcopy(base)
    report = medpeft.combine(model, {file: 1.0}, rank=2)
    lost = whole = 0.0
    exact, found = changes(trained_model, base), changes(model, base)
    for name, change in exact.items():
        lost += (change - found[name]).square().sum()
        whole += change.square().sum()
    assert report.error == pytest.approx(float((lost / whole).sqrt()), rel=1e-9)


def test_one_file_below_zero_keeps_its_head_where_that_is_named():
    base = make("vit")
    file, trained_model = trained(base, "lora", 1)
    model = copy.deepcopy(base)
    medpeft.combine(model, {file: -1.0}, head=file)
    assert torch.equal(model.head.weight, trained_model.head.weight)
    with pytest.raises(medpeft.MedpeftError, match="can only be averaged"):
        medpeft.combine(copy.deepcopy(base), {file: -1.0})
