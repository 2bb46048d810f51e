"""`check` leaves the model, its input and the random state alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checked import IMAGES, Net, Norms, X, adapted, failure
from torch import Tensor

import medpeft


def test_a_buffer_that_changes_in_training_is_noted():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += self.training
            return super().forward(x)

    model = medpeft.apply(Counting(), "lora", target="linear")
    assert medpeft.check(model, X).notes == ["steps, a buffer, changes in training and is not saved"]
    assert model.steps == 0


def test_a_model_that_cannot_be_copied_is_refused_with_the_reason():
    class Stubborn(Net):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    assert "This Stubborn cannot be copied" in failure(medpeft.apply(Stubborn(), "lora", target="linear"))


def state_of(model):
    """Everything of a model that a check could disturb."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {name: t.detach().clone() for name, t in tensors},
        "identities": [id(t) for _, t in tensors],
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.clone())
            for name, p in model.named_parameters()
        },
        "trains": [p.requires_grad for p in model.parameters()],
        "versions": [t._version for _, t in tensors],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
    }


def same(a, b):
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def random_states():
    return [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


class Restless(Norms):
    """Draws from every generator, keeps a cache and fails on demand."""

    def __init__(self, fail=False):
        super().__init__()
        self.fail = fail
        self.cache = {}

    def forward(self, x):
        self.cache["x"] = x
        x = x + 0.0 * (torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002
        if self.fail and torch.is_grad_enabled() and not self.training:
            raise RuntimeError("on demand")
        return super().forward(x)


@pytest.mark.parametrize("method", ["ssf", "svdiff", "bn+bias", "full"])
@pytest.mark.parametrize("fail", [False, True])
def test_every_bit_of_the_model_and_of_the_random_states_stays(method, fail):
    model = medpeft.apply(Restless(fail), method)
    model.train()
    model.bn1.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, drawn = state_of(model), random_states()
    if fail:
        assert "RuntimeError: on demand" in failure(model, IMAGES)
    else:
        medpeft.check(model, IMAGES)
    assert same(before, state_of(model))
    assert same(drawn, random_states())
    assert model.cache == {}


@pytest.mark.cuda
def test_a_model_on_a_gpu_passes_and_the_gpus_random_state_stays():
    model, x = adapted(lambda net, x: F.dropout(net.second(x), 0.2, net.training)).cuda(), X.cuda()
    drawn = torch.cuda.get_rng_state()
    assert medpeft.check(model, x).tensors == 6
    assert torch.equal(drawn, torch.cuda.get_rng_state())


def test_an_input_is_not_changed():
    x = X.clone()
    medpeft.check(adapted(), x)
    assert torch.equal(x, X)
    assert x.grad is None
