"""`check` follows any nesting of inputs and outputs, and varies what has no variation."""

from dataclasses import dataclass

import pytest
import torch
from checked import Net, X, adapted, failure, unused
from models import example, make, randomise
from torch import Tensor, nn

import medpeft


def test_an_input_without_variation_is_replaced_by_noise():
    model = medpeft.apply(make("resnet", torch.float32), "full")
    assert medpeft.check(model, torch.zeros(2, 3, 32, 32)).tensors > 20


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("run", [None, lambda net, x: net.second(x) if bool(x.sum() < 1e9) else x])
def test_a_caller_without_gradients_gets_the_same_verdicts(mode, run):
    model, lacking = adapted(run), adapted(unused)
    with mode():
        assert medpeft.check(model, X.clone()).tensors == 6
        assert "second.adapters.lora.up cannot act in train and eval mode: second never runs" in failure(
            lacking
        )


class Masked(nn.Module):
    """A weighting of tokens that a float mask of ones lets through, scores far below every other where it is 0."""

    def __init__(self):
        super().__init__()
        self.score, self.head = nn.Linear(6, 1), nn.Linear(6, 3)
        randomise(self)

    def forward(self, x, mask):
        scores = self.score(x)[..., 0] + 10_000 * (mask - 1)
        return self.head((scores.softmax(-1)[..., None] * x).sum(1))


def test_a_mask_of_ones_is_left_as_it_is():
    model = medpeft.apply(Masked(), "lora", target="score", rank=1)
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))

    assert medpeft.check(model, (x, torch.ones(2, 5))).tensors == 4


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None
    count: int = 0


class Wrapped(Net):
    """A model with keyword inputs and a nested output."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, pixels, mask=None):
        logits = super().forward(pixels)
        return self.wrap(logits if mask is None else logits * mask)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: Output(y, (y.detach(),)),
        lambda y: {"logits": y, "ids": y.argmax(-1)},
        lambda y: (None, [y]),
        lambda y: [{"a": Output(y)}],
        lambda y: torch.view_as_complex(torch.stack([y, y], -1)),
    ],
)
@pytest.mark.parametrize("inputs", [X, (X, torch.ones(3)), {"pixels": X, "mask": torch.ones(3)}])
def test_any_nesting_of_inputs_and_outputs_is_followed(wrap, inputs):
    model = medpeft.apply(Wrapped(wrap), "lora", target="linear", head="head")
    assert medpeft.check(model, inputs).tensors == 6


def test_hugging_face_outputs_and_keyword_inputs_are_followed():
    model = medpeft.apply(make("hf_vit", torch.float32), "lora")
    assert medpeft.check(model, {"pixel_values": example("hf_vit", torch.float32)}).tensors > 8


def test_a_model_without_floating_point_outputs_is_refused():
    model = medpeft.apply(Wrapped(lambda y: y.argmax(-1)), "lora", target="linear", head="head")
    assert "returned Tensor without a floating-point tensor in it" in failure(model)


def test_a_model_that_does_not_run_on_the_input_is_refused_with_its_own_error():
    assert "Net does not run on example_input in train mode: RuntimeError:" in failure(adapted(), X[:, :3])
