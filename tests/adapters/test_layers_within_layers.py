"""Layers that call themselves, each other, or read each other's weights, in forwards within forwards."""

import pytest
import torch
from every_method import perturb
from models import randomise
from torch import nn

import medpeft


class Again(nn.Module):
    """Calls itself, and reads the weight afterwards."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, times=2):
        if times:
            x = self(x, times - 1)
        return torch.relu(nn.functional.linear(x, self.fc.weight, self.fc.bias))


class Itself(nn.Linear):
    """A layer that calls itself."""

    def forward(self, x, times=2):
        return super().forward(x) if times == 0 else self(x, times - 1).tanh()


class Several(nn.Module):
    """Reads the weights of two layers, one of which a neighbour calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.neighbour = nn.Sequential(self.b, nn.Tanh())

    def forward(self, x):
        x = nn.functional.linear(x, self.a.weight, self.a.bias) + nn.functional.linear(
            x, self.b.weight, self.b.bias
        )
        return self.neighbour(x)


class Shared(nn.Module):
    """One layer in two modules, of which the first calls it and the second reads its weight."""

    def __init__(self):
        super().__init__()
        layer = nn.Linear(8, 8)
        self.caller = nn.Sequential(layer)
        self.reader = Reads(layer)

    def forward(self, x):
        return self.reader(self.caller(x))


class Reads(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


BUILDS = {"again": Again, "itself": lambda: Itself(8, 8), "several": Several, "shared": Shared}


ON_WEIGHTS = (
    "svdiff",
    "dora",
)  # A layer with a forward of its own is no linear map: only its weight has a meaning.


@pytest.mark.parametrize(
    ("build", "method"),
    [
        (build, method)
        for build in BUILDS
        for method in ("lora", "svdiff", "ssf", "oft", "vera", "ia3", "dora")
        if build != "itself" or method in ON_WEIGHTS
    ],
)
def test_layers_within_themselves_and_within_each_other_compute_what_the_merged_model_does(build, method):
    model = randomise(nn.Sequential(BUILDS[build](), nn.Linear(8, 2)).double())
    x = torch.randn(3, 8, dtype=torch.float64)
    name, options = ("lora", {"dora": True}) if method == "dora" else (method, {})
    base = model(x)
    perturb(medpeft.apply(model, name, target="linear", head="1", **options), size=0.3)
    y = model(x)

    assert not torch.allclose(y, base)
    with medpeft.merged(model):
        torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-12)
    medpeft.remove(model)
    assert torch.equal(model(x), base)
