"""What every method promises, on every family of models it fits."""

import copy
import pickle
import warnings
from fnmatch import fnmatch
from functools import cache

import pytest
import torch
from models import FAMILIES, example, make, output, randomise_adapters
from recipes import NEEDS, RECIPES, SLOW, SOLE
from traces import same, tensors, trace

import medpeft
from medpeft.adapters.requests import resolve


def _pairs(fitting, recipes=RECIPES):
    return [
        pytest.param(family, recipe, id=f"{family}-{recipe}")
        for family, about in FAMILIES.items()
        for recipe in recipes
        if (NEEDS.get(recipe, next(iter(about.has))) in about.has) == fitting
        and recipe in SLOW.get(family, RECIPES)
        and family in SOLE.get(recipe, FAMILIES)
    ]


FITTING = _pairs(True)
ADDITIVE = [
    name
    for name, (method, _) in RECIPES.items()
    if any(chosen.adapter for chosen, _, _ in resolve(method, {}))
]


def adapt(model, family, recipe):
    method, options = RECIPES[recipe]
    return medpeft.apply(model, method, head=FAMILIES[family].head, **options)


@torch.no_grad()
def perturb(model, seed=1):
    """Move everything that trains away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def evaluated(model, x):
    with torch.no_grad():
        return output(model.eval(), x)


def trained(model, x):
    """Output in train mode, random layers drawing the same each time, with gradients filled in."""
    torch.manual_seed(3)
    y = output(model.train(), x)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach()


@cache
def base_in_training(family):
    """What `trained` gives for the base."""
    return trained(make(family), example(family))


def base_beside(model, family):
    """Output of the base, with gradients asked for as in the adapted model: by that, torch picks between its kernels."""
    asking = [name for name, p in model.named_parameters() if p.requires_grad and "adapters." not in name]
    return _base(family, frozenset(asking))


@cache
def _base(family, asking):
    base = make(family)
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name in asking)
    return evaluated(base, example(family))


@pytest.mark.parametrize(("family", "recipe"), _pairs(False))
def test_a_method_that_does_not_fit_is_refused_with_the_reason_and_leaves_the_model_alone(family, recipe):
    model = make(family)
    before, about = tensors(model), trace(model)

    with pytest.raises(medpeft.MedpeftError) as error:
        adapt(model, family, recipe)

    method = RECIPES[recipe][0]
    assert str(error.value).startswith(
        (f"{method!r} found nothing to train in {type(model).__name__}", f"{method!r} would")
    )
    assert "Try '" in str(error.value) or "pass head='name'" in str(error.value)
    assert same(tensors(model), before)
    assert trace(model) == about


@pytest.mark.parametrize(("family", "recipe"), FITTING)
def test_adapters_change_nothing_at_first_and_something_in_train_and_in_eval_later(family, recipe):
    model, x = make(family), example(family)
    adapt(model, family, recipe)
    base = base_beside(model, family)
    start = evaluated(model, x)
    if family == "levit" and recipe in (
        "pissa",
        "olora",
    ):  # Two products, of which torch computes one in another order.
        close(start, base)
    elif all(method.adapter is None or method.identity for method, _, _ in resolve(RECIPES[recipe][0], {})):
        assert torch.equal(start, base)
    else:
        assert start.shape == base.shape
        assert not torch.equal(start, base)

    perturb(model)
    adapted = evaluated(model, x)
    assert (adapted - base).abs().max() > 1e-6 * base.abs().max()
    model.zero_grad()
    assert (trained(model, x) - base_in_training(family)).abs().max() > 1e-6 * base.abs().max()


@pytest.mark.parametrize(("family", "recipe"), FITTING)
def test_training_moves_every_declared_parameter_and_nothing_else(family, recipe):
    model, x = make(family), example(family)
    randomise_adapters(adapt(model, family, recipe))
    # What adapters share stands in the state once under every name.
    declared = {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    if recipe == "full":
        declared |= {name for name, _ in model.named_buffers() if "running_" in name or "num_batches" in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = tensors(model)

    trained(model, x)
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= declared
    dead = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    assert {name for name in dead if not any(fnmatch(name, glob) for glob in FAMILIES[family].dead)} == set()

    optimizer.step()
    after = tensors(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} <= declared


@pytest.mark.parametrize(("family", "recipe"), FITTING)
def test_disabled_is_the_base_and_removal_leaves_no_trace(family, recipe):
    model, x = make(family), example(family)
    next(model.parameters()).requires_grad_(False)
    before, about, base = tensors(model), trace(model), base_beside(model, family)

    perturb(adapt(model, family, recipe))
    adapted = evaluated(model, x)
    with medpeft.disabled(model):
        assert torch.equal(evaluated(model, x), base_beside(model, family))
    assert torch.equal(evaluated(model, x), adapted)
    assert before.keys() <= model.state_dict().keys()

    trained(model, x)
    model.eval()
    assert medpeft.remove(model) is model
    assert same(tensors(model), before)
    assert trace(model) == about
    assert torch.equal(evaluated(model, x), base)


@pytest.mark.parametrize(("family", "recipe"), _pairs(True, ["bias", *ADDITIVE]))
def test_copies_compute_the_same_and_are_independent(family, recipe):
    model, x = make(family), example(family)
    perturb(adapt(model, family, recipe))
    adapted = evaluated(model, x)

    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(evaluated(twin, x), adapted)
    perturb(model, seed=2)
    assert not torch.equal(evaluated(model, x), adapted)
    for twin in copies:
        assert torch.equal(evaluated(twin, x), adapted)
        medpeft.remove(twin)
    assert medpeft.report(model).trainable > 0


# Where no weight of the layer computes the same, and the words that say why.
_GROUPED = ("efficientnet", "regnet", "convnext", "hf_convnext", "coatnet")
UNMERGEABLE = {
    **{
        (family, recipe): "AdaptFormer computes what no weight"
        for family in FAMILIES
        for recipe, (method, _) in RECIPES.items()
        if "adaptformer" in method
    },
    **{
        (family, recipe): "a series mixes what a grouped convolution's weight keeps apart"
        for family in _GROUPED
        for recipe in ("tsa series", "residual_adapter series")
    },
    **{
        (family, recipe): method.unmergeable
        for family in FAMILIES
        for recipe, (called, _) in RECIPES.items()
        for method, _, _ in resolve(called, {})
        if method.adapter and method.unmergeable
    },
}


@pytest.mark.parametrize(("family", "recipe"), _pairs(True, ADDITIVE))
def test_the_merged_model_computes_the_same_and_unmerging_restores_every_bit(family, recipe):
    model, x = make(family), example(family)
    perturb(adapt(model, family, recipe))
    adapted = evaluated(model, x)
    before, about = tensors(model), trace(model)

    if (family, recipe) in UNMERGEABLE:
        with pytest.raises(medpeft.MedpeftError, match="cannot be merged into this") as error:
            medpeft.merge(model)
        assert UNMERGEABLE[family, recipe] in str(error.value)
        assert same(tensors(model), before)
        assert trace(model) == about
        return

    with medpeft.merged(model):
        close(evaluated(model, x), adapted)
    assert same(tensors(model), before)
    assert trace(model) == about

    with warnings.catch_warnings():  # A layer without a bias may get one.
        warnings.filterwarnings("ignore", "merge created")
        medpeft.merge(model)
    assert not any("adapters" in name for name, _ in model.named_modules())
    close(evaluated(model, x), adapted)


def close(first, second):
    assert (first - second).abs().max() <= 1e-10 * second.abs().max()
