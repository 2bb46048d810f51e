"""Every method in its variants at every kind of place and in every precision: the start as the base, and merging.

A new method is in it by itself. What does not fit must be refused, with the model as it was.
"""

from functools import cache

import pytest
import torch
from choices import starts_as_base, variants
from models import randomise_adapters
from tiny_places import PLACES, apply_at, build, example
from traces import same, tensors, trace

import medpeft
from medpeft.adapters.registry import find

# Largest difference of an output after merging, as a share of the largest output. In half precision the merged weight
# is rounded, and the adapted one is not.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}

pytestmark = pytest.mark.filterwarnings("ignore:merge created")


@cache
def base_output(place, dtype, trained):
    """Output of the base, with gradients asked for as in the adapted model: by that, torch picks between its kernels."""
    model = build(place, dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model(example(place, dtype))


def adapted(place, method, options, dtype):
    """The adapted model; None where it is refused, with the model as it was."""
    model = build(place, dtype)
    if options.get("mask") == "gradient":
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
    before, about = tensors(model), trace(model)
    try:
        return apply_at(place, model, method, **options)
    except medpeft.MedpeftError:
        assert same(tensors(model), before)
        assert trace(model) == about
        return None


def merged_output(model, x, **options):
    """Output of the merged model; None if it is refused for another reason than its precision."""
    try:
        with medpeft.merged(model, **options):
            return model(x)
    except medpeft.MedpeftError as error:
        if "cannot be merged into this" not in str(error) or "would keep" in str(error):
            raise
        return None


def assert_starts_as_base(model, x, base, method, options):
    y = model(x)
    assert (y.dtype, y.shape) == (base.dtype, base.shape)
    if starts_as_base(method, options):
        assert torch.equal(y, base), (options, y.dtype)
        # No precision loses anything of an update that is zero.
        merged = merged_output(model, x)
        assert merged is None or torch.equal(merged, base), (options, y.dtype)


def assert_computes_what_it_merges_into(model, x, method, options):
    y, merged = model(x), merged_output(model, x, min_kept=0)
    if merged is not None:
        assert not find(method).unmergeable
        difference = (merged.double() - y.double()).abs().max() / y.double().abs().max()
        assert difference <= TOLERANCE[y.dtype], (options, y.dtype)


@torch.no_grad()
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", medpeft.methods())
def test_a_method_starts_as_the_base_and_computes_what_it_merges_into(method, place):
    for options in variants(method):
        for dtype in TOLERANCE:
            model, x = adapted(place, method, options, dtype), example(place, dtype)
            if model is None:
                break  # What fits does not depend on the precision.
            trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
            assert_starts_as_base(model, x, base_output(place, dtype, trained), method, options)
            randomise_adapters(model, size=0.2)
            assert_computes_what_it_merges_into(model, x, method, options)


@torch.no_grad()
@pytest.mark.parametrize("method", medpeft.methods())
def test_adapters_of_a_narrower_dtype_start_as_the_base_too(method):
    for options in filter(lambda options: starts_as_base(method, options), variants(method)):
        for place in PLACES:
            model = adapted(place, method, {"dtype": torch.bfloat16, **options}, torch.float32)
            if model is not None:
                trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
                base = base_output(place, torch.float32, trained)
                assert torch.equal(model(example(place, torch.float32)), base), (place, options)


@pytest.mark.parametrize("place", [place for place in PLACES if "conv" in place])
@pytest.mark.parametrize("method", medpeft.methods())
def test_an_image_without_a_batch_gives_what_it_gives_in_one(method, place):
    for options in variants(method):
        model = adapted(place, method, options, torch.float64)
        if model is not None:
            randomise_adapters(model, size=0.2)
            x = example(place, torch.float64)
            torch.testing.assert_close(model(x[0]), model(x)[0], rtol=1e-11, atol=1e-11)


def first_fit(method, options):
    """The first place that a method fits, and its model adapted."""
    for place in PLACES:
        model = adapted(place, method, options, torch.float32)
        if model is not None:
            return place, model
    raise AssertionError(f"{method} fits nowhere with {options}")


@pytest.mark.parametrize("method", medpeft.methods())
def test_every_variant_fits_somewhere_and_starts_the_same_in_any_order_of_options_and_methods(method):
    beside = "norm" if method == "bias" else "bias"
    for options in variants(method):
        place, model = first_fit(method, options)
        start = tensors(model)
        turned = adapted(place, method, dict(reversed(options.items())), torch.float32)
        assert same(tensors(turned), start), options
        for together in ({method: options, beside: {}}, {beside: {}, method: options}):
            union = adapted(place, together, {}, torch.float32)
            assert union is None or same(tensors(union), start), options
