"""Adapted models work with what torch offers: compile, autocast, checkpointing, functorch, low precision, threads."""

import pytest
import torch
from models import FAMILIES, example, make, output, randomise_adapters
from torch import nn
from torch.utils.checkpoint import checkpoint

import medpeft

PAIRS = [
    ("resnet", "tsa+ssf"),
    ("convnext", "ssf+svdiff"),
    ("vit", "lora+ssf"),
    ("vit", "adaptformer"),
    ("beit", "lora+ssf"),
    ("multihead_attention", "lora"),
    ("hf_vit", "fact+repadapter"),
    ("vit", "oft+ia3+difffit"),
    ("vit", "lst"),
    ("resnet", "dtl"),
]
MORE = [
    *PAIRS,
    ("efficientnet", "lora"),
    ("densenet", "svdiff"),
    ("swinv2", "lora"),
    ("hf_dinov2", "adaptformer"),
    ("monai_unet3d", "tsa"),
    ("maxvit", "lora"),
    ("torchvision_vit", "ssf+lora"),
    ("transformer_encoder", "lora"),
    ("beit", "vera+repadapter"),
]

# transformers warns of itself while its models are traced.
TRACED = [
    *(pair for pair in PAIRS if pair[0] != "hf_vit"),
    ("efficientnet", "bias+ssf"),
    ("monai_unet3d", "tsa"),
]


def adapted(family, method, dtype=torch.float32):
    model = medpeft.apply(make(family, dtype), method, head=FAMILIES[family].head)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):  # Draws that compiled and eager code need not share.
            module.p = 0.0
    return randomise_adapters(model), example(family, dtype)


def gradients(model, y):
    model.zero_grad()
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(first, second, tolerance=1e-4):
    assert first.keys() == second.keys()
    for name, gradient in first.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert (gradient - second[name]).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize(("family", "method"), PAIRS)
def test_a_compiled_model_computes_the_same_forward_and_backward_without_a_break(family, method):
    model, x = adapted(family, method)
    model.train()
    expected = output(model, x)
    eager = gradients(model, expected)

    torch._dynamo.reset()
    y = output(torch.compile(model, fullgraph=True, backend="aot_eager"), x)

    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert_same_gradients(eager, gradients(model, y), tolerance=1e-3)


@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore:.torch.jit:FutureWarning",
    "ignore:.torch.jit:DeprecationWarning",
)
@pytest.mark.parametrize(("family", "method"), TRACED)
def test_a_traced_model_computes_the_same(family, method):
    model, x = adapted(family, method)
    expected = output(model.eval(), x)
    traced = torch.jit.trace(model, x, strict=False)
    torch.testing.assert_close(output(traced, x), expected, rtol=1e-4, atol=1e-5)
    with medpeft.disabled(model):
        assert not torch.allclose(output(model, x), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("family", "method"), MORE)
def test_autocast_computes_nearly_the_same_and_leaves_the_gradients_in_float32(family, method):
    model, x = adapted(family, method)
    expected = output(model, x)

    with torch.autocast("cpu", torch.bfloat16):
        y = output(model, x)
    trained = gradients(model, y.float())

    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    with medpeft.disabled(model), torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(output(model, x), y)
    assert {gradient.dtype for gradient in trained.values()} == {torch.float32}
    assert trained.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(("family", "method"), MORE)
def test_checkpointing_gives_the_same_gradients(family, method, reentrant):
    model, x = adapted(family, method, torch.float64)
    model.train()
    torch.manual_seed(0)
    expected = gradients(model, output(model, x))

    torch.manual_seed(0)
    y = checkpoint(lambda x: output(model, x), x.requires_grad_(), use_reentrant=reentrant)

    assert_same_gradients(expected, gradients(model, y), tolerance=1e-10)


@pytest.mark.parametrize(("family", "method"), MORE)
def test_functional_call_uses_the_parameters_it_is_given(family, method):
    model, x = adapted(family, method, torch.float64)
    other = {name: p.detach() * 1.1 for name, p in model.named_parameters() if p.requires_grad}
    y = torch.func.functional_call(model, other, (x,))

    model.load_state_dict(other, strict=False)

    torch.testing.assert_close(
        y if isinstance(y, torch.Tensor) else y[0], output(model, x), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("family", "method"),
    [("vit", "lora+ssf"), ("convnext", "ssf+svdiff"), ("resnet", "tsa"), ("vit", "fact+repadapter")],
)
def test_functorch_computes_the_gradients_of_autograd(family, method):
    model, x = adapted(family, method, torch.float64)
    expected = gradients(model, output(model, x))
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        y = torch.func.functional_call(model, parameters, (x,))
        return (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum()

    assert_same_gradients(expected, torch.func.grad(loss)(trainable), tolerance=1e-10)


@pytest.mark.parametrize(("family", "method"), MORE)
def test_a_bfloat16_model_gets_float32_adapters_and_answers_in_bfloat16(family, method):
    model, x = adapted(family, method, torch.bfloat16)
    adapters = {p.dtype for name, p in model.named_parameters() if "adapters." in name}

    y = output(model, x)
    trained = gradients(model, y.float())

    assert adapters == {torch.float32}
    assert y.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in trained.values())
    with medpeft.disabled(model):
        assert not torch.equal(output(model, x), y)


def test_a_half_model_gets_float32_adapters():
    model, x = adapted("vit", "lora+ssf+adaptformer+svdiff", torch.float16)

    assert output(model, x).dtype == torch.float16
    assert {p.dtype for name, p in model.named_parameters() if ".adapters." in name} == {torch.float32}


@pytest.mark.parametrize("family", ["vit", "beit", "resnet"])
def test_adapters_take_the_dtype_they_are_asked_for(family):
    method = "lora+ssf+svdiff" if family == "resnet" else "lora+ssf+svdiff+adaptformer"
    model = randomise_adapters(medpeft.apply(make(family, torch.float32), method, dtype=torch.bfloat16))

    y = output(model, example(family, torch.float32))

    assert {p.dtype for name, p in model.named_parameters() if ".adapters." in name} == {torch.bfloat16}
    assert y.dtype == torch.float32
    assert gradients(model, y).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", ["svdiff", "lora", "ssf"])
def test_adapters_of_another_precision_also_act_on_few_rows(method, adapters):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64)).double()
    medpeft.apply(model, method, head=None, dtype=adapters, **({"target": "*"} if method == "lora" else {}))
    x = torch.randn(2, 64, dtype=torch.float64)
    randomise_adapters(model)

    with torch.no_grad(), medpeft.merged(model):
        merged = model(x)

    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), merged, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script:DeprecationWarning", "ignore:.torch.jit.script:FutureWarning"
)
@pytest.mark.parametrize("method", ["lora", "ssf", "bias", "linear_probe"])
def test_torchscript_is_told_to_take_the_merged_model(method):
    model = medpeft.apply(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)), method, head="2"
    )
    with pytest.raises(
        medpeft.MedpeftError, match=r"torch\.jit\.script cannot compile an adapted model: call medpeft"
    ):
        torch.jit.script(model)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    torch.testing.assert_close(torch.jit.script(medpeft.merge(model))(x), expected)
