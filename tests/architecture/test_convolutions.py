"""Adapters of convolutions of every kind that torch allows: identity at first, and the merged layer computes the same."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from models import randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.architecture.convolution import Geometry

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def per_axis(draw, dims, low, high):
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def convolutions(draw):
    """A convolution and an input that it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel, dilation = per_axis(draw, dims, 1, 3), per_axis(draw, dims, 1, 2)
    padding = draw(st.sampled_from(["same", "valid"]) | st.just(per_axis(draw, dims, 0, 2)))
    stride = (1,) * dims if padding == "same" else per_axis(draw, dims, 1, 3)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    conv = CONVS[dims](
        4, draw(st.sampled_from([4, 8])), kernel, stride, padding, dilation, groups, draw(st.booleans()), mode
    )
    sizes = per_axis(draw, dims, 5, 6)
    return conv, torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@st.composite
def transposed_convolutions(draw):
    """A transposed convolution and an input that it takes."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    kernel, dilation, stride = (
        per_axis(draw, dims, 2, 3),
        per_axis(draw, dims, 1, 2),
        per_axis(draw, dims, 1, 3),
    )
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    conv = TRANSPOSED[dims](
        4,
        draw(st.sampled_from([4, 8])),
        kernel,
        stride,
        per_axis(draw, dims, 0, 1),
        extra,
        groups,
        draw(st.booleans()),
        dilation,
    )
    sizes = per_axis(draw, dims, 3, 4)
    return conv, torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@torch.no_grad()
def assert_identity_effect_and_merge(conv, x, method, options, mergeable=True):
    """The adapted layer: as the base at first, different later, and the same once merged or refused with a reason."""
    model = randomise(nn.Sequential(conv).double()).eval()
    base = model(x)
    assume(base.numel() > 0)
    medpeft.apply(model, method, head=None, **options)
    assert torch.equal(model(x), base)

    adapted = randomise_adapters(model)(x)
    assert not torch.equal(adapted, base)
    if not mergeable:
        with pytest.raises(medpeft.MedpeftError, match=r"no tap of a kernel of|a series mixes what"):
            medpeft.merge(model)
        return
    with medpeft.merged(model):
        torch.testing.assert_close(model(x), adapted, rtol=1e-11, atol=1e-11)
    assert torch.equal(model(x), adapted)


@quick
@given(convolutions(), st.sampled_from([{}, {"dora": True}, {"init": "pissa", "rank": 1}, {"alpha": 5.0}]))
def test_lora_of_a_convolution(case, options):
    conv, x = case
    assert_identity_effect_and_merge(conv, x, "lora", {"target": "*", "rank": 2, **options})


@quick
@given(transposed_convolutions(), st.sampled_from([{}, {"dora": True}]))
def test_lora_of_a_transposed_convolution(case, options):
    conv, x = case
    assert_identity_effect_and_merge(conv, x, "lora", {"target": "*", "rank": 2, **options})


@quick
@given(convolutions() | transposed_convolutions())
def test_ssf_of_a_convolution(case):
    conv, x = case
    model = randomise(nn.Sequential(copy.deepcopy(conv)).double())
    medpeft.apply(model, "ssf", head=None)
    randomise_adapters(model)
    y = conv.double()(x)
    with torch.no_grad():
        conv.load_state_dict({k: v for k, v in model[0].state_dict().items() if "adapters" not in k})
        y = conv(x)
        scale, shift = (p.view(-1, *[1] * (x.ndim - 2)) for p in model[0].adapters["ssf"].parameters())
        torch.testing.assert_close(model(x), y * scale + shift, rtol=1e-12, atol=1e-12)
        with medpeft.merged(model):
            torch.testing.assert_close(model(x), y * scale + shift, rtol=1e-11, atol=1e-11)


@quick
@given(convolutions() | transposed_convolutions())
def test_svdiff_of_a_convolution(case):
    conv, x = case
    assert_identity_effect_and_merge(conv, x, "svdiff", {})


@quick
@given(convolutions(), st.sampled_from(["matrix", "vector", "series"]))
def test_tsa_of_a_convolution(case, form):
    conv, x = case
    geometry = Geometry.of(conv)
    one_size = geometry.same_size_as_1x1 and (form != "vector" or conv.in_channels == conv.out_channels)
    if form != "series" and not one_size:
        with pytest.raises(medpeft.MedpeftError, match="'tsa' fits no layer here"):
            medpeft.apply(nn.Sequential(conv), "tsa", head=None, target="*", form=form)
        return
    # Where no 1×1 kernel gives the host's size for this very input, the layer says so itself.
    sizes = [(n - 1) // s + 1 for n, s in zip(x.shape[2:], conv.stride, strict=True)]
    assume(form == "series" or list(conv.double()(x).shape[2:]) == sizes)
    mergeable = conv.groups == 1 if form == "series" else geometry.centre is not None
    assert_identity_effect_and_merge(conv, x, "tsa", {"target": "*", "form": form}, mergeable)
    if form == "matrix":
        parallel_is_a_strided_1x1(conv, x)


@torch.no_grad()
def parallel_is_a_strided_1x1(conv, x):
    """What TSA adds, from x at every stride-th position."""
    alpha = conv.adapters["tsa"].alpha
    seen = x[(..., *(slice(None, None, s) for s in conv.stride))].unflatten(1, (conv.groups, -1))
    added = torch.einsum("goi,ngi...->ngo...", alpha.unflatten(0, (conv.groups, -1)), seen).flatten(1, 2)
    model = nn.Sequential(conv)
    adapted = model(x)
    conv.adapters.enabled = False
    torch.testing.assert_close(adapted - model(x), added, rtol=1e-10, atol=1e-10)


@quick
@given(convolutions())
def test_the_geometry_of_a_convolution_repeats_it(case):
    conv, x = case
    conv = conv.double()
    if conv.bias is not None:
        conv.bias.data.zero_()

    torch.testing.assert_close(
        Geometry.of(conv).convolve(x, conv.weight, conv.groups), conv(x), rtol=1e-12, atol=1e-12
    )
