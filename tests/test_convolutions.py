"""Every geometry of a convolution: the adapted layer equals one layer with the merged weight, in float64."""

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import medpeft

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
QUICK = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def convolutions(draw, transposed=False):
    """A convolution with random geometry, and an input for it."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2, 4]))
    inputs, outputs = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    options = {
        "kernel_size": tuple(draw(st.integers(1, 4)) for _ in range(dims)),
        "stride": draw(st.integers(1, 3)),
        "dilation": draw(st.integers(1, 2)),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    if transposed:
        options["padding"] = draw(st.integers(0, 1))
        layer = TRANSPOSED[dims](inputs, outputs, **options)
    else:
        options["padding"] = draw(st.one_of(st.integers(0, 3), st.sampled_from(["valid", "same"])))
        if options["padding"] == "same":
            options["stride"] = 1
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
        layer = CONV[dims](inputs, outputs, **options)
    return layer.double(), torch.randn(2, inputs, *(draw(st.integers(6, 9)) for _ in range(dims)), dtype=torch.float64)


def adapts_as_it_merges(layer, x, method, **options):
    """Identity at first; once random, an effect, in training too, and the merged layer computes the same."""
    model = nn.Sequential(layer)
    try:
        plain = model(x).detach()
    except RuntimeError:
        assume(False)  # A padding or kernel larger than torch accepts for this input.
    medpeft.apply(model, method, head=None, **options)
    # The same numbers at another address may be added up in another order.
    torch.testing.assert_close(model(x).detach(), plain, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "adapters" in name:
                p.add_(torch.randn_like(p))
    found = model(x)
    assert not torch.equal(found, plain)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with medpeft.merged(model), torch.no_grad():
        torch.testing.assert_close(model(x), found.detach(), rtol=1e-10, atol=1e-10)
    medpeft.merge(model)
    torch.testing.assert_close(model(x), found.detach(), rtol=1e-10, atol=1e-10)


@QUICK
@given(convolutions(), st.booleans())
def test_lora_merges_into_every_convolution(case, dora):
    adapts_as_it_merges(*case, "lora", rank=2, dora=dora)


@QUICK
@given(convolutions(transposed=True))
def test_lora_merges_into_every_transposed_convolution(case):
    adapts_as_it_merges(*case, "lora", rank=2, target="conv")


@QUICK
@given(convolutions())
def test_svdiff_merges_into_every_convolution(case):
    adapts_as_it_merges(*case, "svdiff")


@QUICK
@given(convolutions(transposed=True))
def test_svdiff_merges_into_every_transposed_convolution(case):
    adapts_as_it_merges(*case, "svdiff")


@QUICK
@given(convolutions())
def test_ssf_merges_into_every_convolution(case):
    layer, x = case
    if layer.bias is None:  # Merging gives such a layer a bias, and says so.
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, dtype=torch.float64))
    adapts_as_it_merges(layer, x, "ssf")


@QUICK
@given(convolutions(transposed=True))
def test_ssf_merges_into_every_transposed_convolution(case):
    layer, x = case
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(layer.out_channels, dtype=torch.float64))
    adapts_as_it_merges(layer, x, "ssf")


@QUICK
@given(convolutions(), st.sampled_from(["matrix", "vector"]))
def test_tsa_merges_where_a_tap_sees_what_it_sees_and_says_so_elsewhere(case, form):
    layer, x = case
    model = nn.Sequential(layer)
    try:
        plain = model(x).detach()
        medpeft.apply(model, "tsa", head=None, target="*", form=form)
    except (RuntimeError, medpeft.MedpeftError):
        assume(False)
    strided = x[(slice(None), slice(None), *(slice(None, None, s) for s in layer.stride))]
    assume(strided.shape[2:] == plain.shape[2:])  # The sizes agree for some inputs alone: e.g. 2×2 at stride 2.
    torch.testing.assert_close(model(x).detach(), plain, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        model[0].adapters["tsa"].alpha.add_(torch.randn_like(model[0].adapters["tsa"].alpha))
    found = model(x).detach()
    try:
        with medpeft.merged(model), torch.no_grad():
            torch.testing.assert_close(model(x), found, rtol=1e-10, atol=1e-10)
    except medpeft.MedpeftError as reason:
        assert "no tap" in str(reason)  # noqa: PT017 - either outcome is right, depending on the geometry
        padding = layer._reversed_padding_repeated_twice[::2][::-1]
        assert any(p % d or p // d >= k for p, d, k in zip(padding, layer.dilation, layer.kernel_size, strict=True))
