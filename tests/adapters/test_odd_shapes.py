"""An adapted layer takes every shape that its base takes: one image, one vector, an empty batch."""

import copy

import pytest
import torch
from models import randomise, randomise_adapters
from single_layers import LAYERS, OPTIONS, Block, Holder, drawn
from torch import nn

import medpeft

VARIANTS = [
    ("linear", "lora", {"dora": True}),
    ("conv2d", "lora", {"dora": True}),
    ("conv2d", "lora", {"init": "pissa", "rank": 3}),
    ("conv2d, grouped", "lora", {"dropout": 1e-9}),
    ("conv2d", "tsa", {"form": "series"}),
    ("conv2d", "residual_adapter", {"form": "series"}),
    ("conv2d", "conv_adapter", {"form": "sequential"}),
    ("conv2d", "ssf", {"keep_outputs": True}),
]
FITTING = [(layer, method, {}) for layer in LAYERS for method in sorted(medpeft.methods())] + VARIANTS


def gradients(model, y):
    """Gradients of all that trains, for a loss that weights every value of y differently."""
    weights = torch.arange(y.numel(), dtype=y.dtype).view(y.shape).cos()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.autograd.grad((y * weights).sum(), trained, materialize_grads=True)


@pytest.mark.parametrize(("layer", "method", "options"), FITTING)
def test_one_image_one_vector_and_no_image_give_what_a_batch_gives(layer, method, options):
    build, shape, fitting = LAYERS[layer]
    model = randomise(Holder(build()).double())
    settings = {"head": None, "target": "*"} | OPTIONS.get(method, {}) | options
    if method not in fitting.split():
        with pytest.raises(medpeft.MedpeftError, match=f"'{method}'"):
            medpeft.apply(model, method, **settings)
        return
    base = copy.deepcopy(model)
    randomise_adapters(medpeft.apply(model, method, **settings), size=0.3)

    axis = 1 if layer == "attention, batch second" else 0
    x = drawn(shape)
    for odd in (x.select(axis, 1), x[0, 0], x.narrow(axis, 0, 0)):
        try:
            expected_shape = base(odd).shape
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue  # The layer itself does not take it.
        y = model(odd)
        assert y.shape == expected_shape
        for inference in (torch.no_grad(), torch.inference_mode()):
            with inference:
                torch.testing.assert_close(model(odd), y.detach(), rtol=1e-10, atol=1e-12)
        of_odd = gradients(model, y)
        if odd.numel() == 0:
            assert not any(gradient.any() for gradient in of_odd)
            continue
        batch = model(odd.unsqueeze(axis if odd.ndim == x.ndim - 1 else 0)).squeeze(axis)
        torch.testing.assert_close(y, batch, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(of_odd, gradients(model, batch), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "method",
    ["adapter_plus", "adaptformer", "convpass", "difffit", "houlsby", "ia3", "mona", "pfeiffer", "prefix"],
)
def test_a_block_takes_the_tokens_of_one_image_and_of_none(method, batch_first):
    model = randomise(nn.Sequential(Block(batch_first)).double()).eval()
    randomise_adapters(medpeft.apply(model, method, head=None), size=0.3)
    axis = 0 if batch_first else 1
    x = drawn((3, 9, 8)).movedim(0, axis)

    y = model(x.select(axis, 1))
    batch = model(x.narrow(axis, 1, 1)).squeeze(axis)

    torch.testing.assert_close(y, batch, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(model, y), gradients(model, batch), rtol=1e-9, atol=1e-10)
    assert model(x.narrow(axis, 0, 0)).shape == x.narrow(axis, 0, 0).shape


@pytest.mark.parametrize("method", ["vpt_deep", "vpt_shallow"])
def test_prompts_refuse_tokens_without_a_batch(method):
    model = medpeft.apply(nn.Sequential(Block(True)), method, head=None)
    with pytest.raises(
        medpeft.MedpeftError, match=r"adds tokens to sequences \(B, N, D\), and 0 was given \(9, 8\)"
    ):
        model(torch.randn(9, 8))
    assert model(torch.randn(0, 9, 8)).shape == (0, 9, 8)


class MaskedBlock(Block):
    """A block with a second input, and layers called by keyword."""

    def forward(self, x, mask=None):
        y = self.norm1(input=x)
        x = x + self.attn(value=y, need_weights=False, attn_mask=mask, key=y, query=y)[0]
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    "method",
    [
        "adaptformer",
        "convpass",
        "lora",
        "mona",
        "oft",
        "pfeiffer",
        "prefix",
        "repadapter",
        "ssf",
        "svdiff",
        "vpt_deep",
    ],
)
def test_the_order_of_keywords_does_not_decide_what_is_adapted(method):
    model = randomise(nn.Sequential(MaskedBlock(True)).double()).eval()
    options = {"tokens": 1} if method == "prefix" else {}
    randomise_adapters(medpeft.apply(model, method, head=None, **options), size=0.3)
    x, mask = drawn((2, 9, 8)), drawn((9, 9))

    torch.testing.assert_close(model[0](mask=mask, x=x), model[0](x, mask), rtol=1e-10, atol=1e-12)
