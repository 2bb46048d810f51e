"""Every additive method with any options at any layer in any precision, drawn by hypothesis.

The base at first, adapted = merged, and gradients against float64. See CONTRIBUTING.md for a run of 100,000 examples.
"""

import copy

import pytest
import torch
from choices import DETACHING, starts_as_base
from drawn import NETWORKS, cases, options_of, thorough
from hypothesis import assume, given, note
from hypothesis import strategies as st
from models import randomise_adapters
from tiny_places import apply_at
from torch.func import functional_call

import medpeft
from medpeft.adapters.record import adapted_layers
from medpeft.adapters.registry import find

ADDITIVE = [name for name in medpeft.methods() if find(name).adapter is not None]
PRECISIONS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Of the coarsest dtype that takes part, as a share of the largest output.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
# What is left in float64 where all terms of a gradient cancel, as at a softmax over one token.
ROUNDING = 1e-15

pytestmark = pytest.mark.filterwarnings("ignore:merge created")


def adapted(kind, model, method, options, dtype=None):
    """The adapted model, or None where it is refused."""
    try:
        return apply_at(kind, model, method, dtype=dtype, **options)
    except medpeft.MedpeftError as error:
        note(str(error))
        return None


def output(model, x):
    """Output of a model, or None where an adapter finds out that it cannot act on such an input."""
    try:
        return model(x)
    except medpeft.MedpeftError as error:
        note(str(error))
        return None


def cast(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("method", ADDITIVE)
@thorough
@given(data=st.data())
@torch.no_grad()
def test_any_adapter_starts_as_the_base_and_computes_what_it_merges_into(method, data):
    kind, model, x = data.draw(cases(method))
    options = data.draw(options_of(method))
    base_dtype = data.draw(st.sampled_from(PRECISIONS))
    own_dtype = data.draw(st.sampled_from([None, None, *PRECISIONS]))
    model, x = model.to(base_dtype).requires_grad_(False), cast(x, base_dtype)
    # An embedding with a max_norm shortens its rows in every forward, in float16 once more by a last bit.
    base = copy.deepcopy(model)(x)
    assume(base.isfinite().all())  # Large weights overflow in float16.
    model = adapted(kind, model, method, options, own_dtype)
    if model is None:
        return
    model.requires_grad_(False)
    y = output(model, x)
    if y is None:
        return
    assert (y.dtype, y.shape) == (base.dtype, base.shape)
    if starts_as_base(method, options):
        assert torch.equal(y, base)

    y = randomise_adapters(model, size=0.2)(x)
    merged = merged_output(model, x)
    coarsest = max((base_dtype, own_dtype or base_dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if merged is None or (kind in NETWORKS and coarsest in (torch.float16, torch.bfloat16)):
        return
    assert not find(method).unmergeable
    assert_near(merged, y, TOLERANCE[coarsest], base)


def merged_output(model, x):
    """Output of the merged model, or None if it cannot be merged."""
    try:
        with medpeft.merged(model, min_kept=0):
            return model(x)
    except medpeft.MedpeftError as error:
        if "cannot be merged into this" not in str(error):
            raise
        return None


def assert_near(found, expected, tolerance, *others, floor=0.0):
    """Compare two tensors, relative to the largest of all values that take part."""
    largest = max(size(tensor) for tensor in (expected, *others))
    assert size(found.double() - expected.double()) <= tolerance * largest + floor


def size(tensor):
    """The largest absolute value; 0 where there is none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@pytest.mark.parametrize("method", ADDITIVE)
@thorough
@given(data=st.data())
def test_any_gradient_is_that_of_the_merged_weights_or_of_differences(method, data):
    kind, model, x = data.draw(cases(method))
    options = data.draw(options_of(method))
    model = adapted(kind, model, method, options)
    if model is None or output(model, x) is None:
        return
    randomise_adapters(model, size=0.2)
    inputs = [p for p in model.parameters() if p.requires_grad]
    if x.is_floating_point() and method not in DETACHING:
        inputs.append(x.requires_grad_())
    upstream = weights_for(model(x))

    found = gradients((model(x) * upstream).sum(), inputs)
    merged = merged_loss(model, x, upstream)
    if merged is not None:
        for gradient, expected in zip(found, gradients(merged, inputs), strict=True):
            assert_near(gradient, expected, 1e-9, *found, floor=ROUNDING)
        return
    direction = [weights_for(tensor) for tensor in inputs]
    along = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
    total = sum(float((g * d).abs().sum()) for g, d in zip(found, direction, strict=True))
    differences = [difference(model, x, upstream, inputs, direction, step) for step in (1e-6, 1e-7)]
    assert min(abs(along - by_difference) for by_difference in differences) <= 1e-5 * (total + 1e-2)


def gradients(loss, inputs):
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(tensor) if g is None else g for g, tensor in zip(found, inputs, strict=True)]


def weights_for(tensor):
    """A fixed weight for every element, so that no gradient cancels by symmetry."""
    drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return drawn.to(tensor.dtype)


def merged_loss(model, x, upstream):
    """The loss through the merged weights, which follow from the adapters; None where they cannot be merged."""
    plain = copy.deepcopy(model)
    try:
        medpeft.merge(plain, min_kept=0)
    except medpeft.MedpeftError as error:
        if "cannot be merged into this" not in str(error):
            raise
        return None
    names = {name for name, _ in plain.named_parameters()}
    tensors = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name, layer, adapters in adapted_layers(model):
        for tensor_name, value in adapters.merged_tensors(layer, adapters.in_merging_order()).items():
            tensors[f"{name}.{tensor_name}"] = value
    return (functional_call(plain, tensors, (x,)) * upstream).sum()


@torch.no_grad()
def difference(model, x, upstream, inputs, direction, step):
    """Difference of the loss along a direction, over the distance."""
    losses = []
    for sign in (1, -2):
        for tensor, along in zip(inputs, direction, strict=True):
            tensor.add_(along, alpha=sign * step)
        losses.append(float((model(x) * upstream).sum()))
    for tensor, along in zip(inputs, direction, strict=True):
        tensor.add_(along, alpha=step)
    return (losses[0] - losses[1]) / (2 * step)
