"""Merging: a plain model that computes the same, or a refusal that leaves everything as it was."""

import logging
import unittest

import pytest
import torch
from models import example, make, output, randomise, randomise_adapters
from timm.layers import ScaledStdConv2d, StdConv2d
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from traces import same, tensors, trace

import medpeft


def test_a_merged_model_is_plain_and_loads_into_a_plain_one():
    model, x = make("vit"), example("vit")
    randomise_adapters(medpeft.apply(model, "lora+ssf", exclude=None))
    adapted = output(model, x)

    assert medpeft.merge(model) is model

    plain = make("vit")
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(plain, x), adapted, rtol=1e-10, atol=1e-10)
    assert trace(model).keys() == trace(plain).keys()


def test_a_selective_method_merges_into_what_it_trained():
    model = medpeft.apply(make("vit"), "bias")
    with torch.no_grad():
        model.blocks[0].norm1.bias.add_(1)
    trained = model.blocks[0].norm1.bias.clone()
    medpeft.merge(model)

    assert torch.equal(model.blocks[0].norm1.bias, trained)
    with pytest.raises(medpeft.MedpeftError, match="is not adapted"):
        medpeft.report(model)


def test_a_bias_that_is_created_is_named_in_a_warning():
    model = randomise_adapters(
        medpeft.apply(nn.Sequential(nn.Linear(3, 4, bias=False)).double(), "ssf", head=None)
    )
    x = torch.randn(2, 3, dtype=torch.float64)
    adapted = model(x)

    with medpeft.merged(model):
        torch.testing.assert_close(model(x), adapted)
    assert model[0].bias is None
    with pytest.warns(UserWarning, match=r"merge created 0\.bias: the unadapted model has no such keys"):
        medpeft.merge(model)
    torch.testing.assert_close(model(x), adapted)


def test_what_cannot_be_merged_is_named_layer_by_layer():
    model = medpeft.apply(make("vit"), "lora+adaptformer")

    with pytest.raises(medpeft.MedpeftError) as error:
        medpeft.merge(model)
    assert str(error.value) == (
        "'lora+adaptformer' cannot be merged into this VisionTransformer:\n"
        "  blocks.0: AdaptFormer computes what no weight of the layer can\n"
        "  blocks.1: AdaptFormer computes what no weight of the layer can\n"
        "Nothing was changed. Run the adapted model as it is, call model.float() first if precision is the reason, or pass "
        "min_kept=0."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ],
)
def test_tsa_merges_into_the_tap_that_sees_the_same(options):
    model = nn.Sequential(nn.Conv2d(2, 3, **options)).double()
    x = torch.randn(1, 2, 6, 6, dtype=torch.float64)
    randomise_adapters(medpeft.apply(model, "tsa", head=None, target="*"))
    adapted = model(x)

    medpeft.merge(model)

    torch.testing.assert_close(model(x), adapted)


def test_tsa_beside_a_dilated_convolution_whose_taps_miss_the_centre_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 3, 2, padding=1, dilation=2)).double()
    randomise_adapters(medpeft.apply(model, "tsa", head=None, target="*"))

    with pytest.raises(
        medpeft.MedpeftError, match=r"0: no tap of a kernel of \(2, 2\) with padding \(1, 1\) sees what"
    ):
        medpeft.merge(model)


def test_a_padding_by_input_size_has_no_fixed_tap():
    model = nn.Sequential(Conv2dSame(2, 3, 3, stride=2)).double()
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    base = model(x)
    randomise_adapters(medpeft.apply(model, "tsa", head=None, target="*"))

    assert not torch.equal(model(x), base)
    with pytest.raises(
        medpeft.MedpeftError, match=r"no tap of a kernel of \(3, 3\) with padding by input size"
    ):
        medpeft.merge(model)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(
            (kind, method)
            for kind in (ScaledStdConv2d, StdConv2d)
            for method in ("lora", "ssf", "svdiff", "tsa")
        ),
        *((Conv2dSame, method) for method in ("lora", "ssf", "svdiff")),
    ],
)
def test_convolutions_of_timm_that_pad_or_standardise_merge_or_say_why_not(kind, method):
    model = randomise(nn.Sequential(kind(2, 3, 3, padding=1)).double())
    x = torch.randn(1, 2, 7, 7, dtype=torch.float64)
    base = model(x)
    medpeft.apply(model, method, head=None, **({"target": "*"} if method in ("lora", "tsa") else {}))
    torch.testing.assert_close(model(x), base, rtol=0, atol=0)
    adapted = randomise_adapters(model)(x)
    assert not torch.allclose(adapted, base)

    if kind is not Conv2dSame and method in ("ssf", "tsa"):
        with pytest.raises(
            medpeft.MedpeftError,
            match=f"0: {kind.__name__} standardises its weight, which undoes what is merged",
        ):
            medpeft.merge(model)
    else:
        with medpeft.merged(model):
            torch.testing.assert_close(model(x), adapted, rtol=1e-10, atol=1e-10)
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_that_rounding_would_lose_is_refused_with_the_share_that_stays(dtype):
    model = randomise(nn.Sequential(nn.Linear(64, 64)).to(dtype))
    medpeft.apply(model, "lora", head=None, target="*")
    randomise_adapters(model, size=1e-3)
    before, about = tensors(model), trace(model)

    with pytest.raises(
        medpeft.MedpeftError, match=r"0: torch\.(bfloat16|float16) would keep \d+% of the update"
    ):
        medpeft.merge(model)
    assert same(tensors(model), before)
    assert trace(model) == about
    medpeft.merge(model, min_kept=0)
    assert model[0].weight.dtype == dtype


def test_a_large_update_merges_in_low_precision():
    model = randomise(nn.Sequential(nn.Linear(16, 16)).bfloat16())
    randomise_adapters(medpeft.apply(model, "lora", head=None, target="*"), size=1.0)
    x = torch.randn(4, 16).bfloat16()
    adapted = model(x).float()

    medpeft.merge(model)

    assert (model(x).float() - adapted).abs().max() < 0.05 * adapted.abs().max()


@pytest.mark.filterwarnings("ignore:merge created")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_norm_without_weights_gets_them_in_the_dtype_of_the_model(dtype):
    norm = nn.LayerNorm(4, elementwise_affine=False)
    model = nn.Sequential(norm, nn.Linear(4, 4)).to(dtype)

    medpeft.merge(medpeft.apply(model, "ssf", target="0", head=None, init="official"), min_kept=0)

    assert norm.weight.dtype == norm.bias.dtype == dtype


def test_an_example_compares_the_outputs_before_the_model_changes():
    model, x = medpeft.apply(make("vit"), "lora+ssf"), example("vit")
    randomise_adapters(model).train()
    before, about = tensors(model), trace(model)

    with pytest.raises(
        medpeft.MedpeftError, match=r"The merged outputs would differ by .* more than tolerance=0\.00e\+00"
    ):
        medpeft.merge(model, example_input=x, tolerance=0.0)
    assert same(tensors(model), before)
    assert trace(model) == about

    with unittest.TestCase().assertLogs("medpeft", logging.INFO) as logs:
        medpeft.merge(model, example_input=x)
    assert "merged outputs differ by" in logs.output[0]


@pytest.mark.parametrize("family", ["hf_vit", "vit"])
def test_an_example_may_be_a_tuple_and_the_output_a_dataclass(family):
    model = randomise_adapters(medpeft.apply(make(family), "lora"))

    medpeft.merge(model, example_input=(example(family),))

    assert not any("adapters" in name for name, _ in model.named_modules())


def test_an_error_inside_merged_brings_the_adapters_back():
    model, x = medpeft.apply(make("vit"), "ssf"), example("vit")
    adapted = output(randomise_adapters(model), x)
    before = tensors(model)

    with pytest.raises(RuntimeError, match="mine"), medpeft.merged(model):
        raise RuntimeError("mine")

    assert same(tensors(model), before)
    assert torch.equal(output(model, x), adapted)


def test_a_merged_model_keeps_the_policy_and_the_gradients_it_had_before():
    model = make("resnet")
    model.conv1.weight.requires_grad_(False)
    medpeft.apply(model, "ssf")

    medpeft.merge(model).train()

    assert model.bn1.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
