"""What became of the base: old gradients and inference mode at `apply`, and values that changed since."""

import pytest
import torch
from torch import nn

import medpeft


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", ["ssf", "bias", "full"])
def test_apply_clears_the_gradients_of_before(method):
    model = mlp(0)
    model(X).sum().backward()
    medpeft.apply(model, method, head="2")
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_optimizer_over_all_parameters_moves_nothing_that_is_frozen():
    model = mlp(0)
    model(X).sum().backward()
    medpeft.apply(model, "ssf", head="2")
    frozen = model[0].weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)


def test_apply_inside_inference_mode_is_refused():
    model = mlp(0)
    keys = list(model.state_dict())
    with torch.inference_mode():
        made_inside = mlp(0)
        with pytest.raises(medpeft.MedpeftError, match=r"inside torch\.inference_mode cannot train"):
            medpeft.apply(model, "ssf", head="2")
    with pytest.raises(medpeft.MedpeftError, match=r"inside torch\.inference_mode cannot train"):
        medpeft.apply(made_inside, "ssf", head="2")
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        medpeft.apply(model, "ssf", head="2")
    assert medpeft.check(model, X).tensors == 4
