"""Small models whose trainable tensors can act or not, by how their layers are used, and what `check` says of them."""

import pytest
import torch
from models import randomise
from torch import nn

import medpeft


class Net(nn.Module):
    """Two linear layers and a head; `run` says how the second is used."""

    def __init__(self, run=None):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.run = run
        self.weights = [self.second.weight]
        randomise(self)

    def forward(self, x):
        x = self.first(x).relu()
        x = self.second(x) if self.run is None else self.run(self, x)
        return self.head(x)


class Norms(nn.Module):
    """Convolution, BatchNorm, convolution, instance norm, head."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.InstanceNorm2d(4)
        self.head = nn.Linear(4, 2)
        randomise(self)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.norm2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def adapted(run=None, method="lora", **options):
    return medpeft.apply(Net(run), method, target="linear", **options)


def failure(model, x=X, **options):
    with pytest.raises(medpeft.MedpeftError) as caught:
        medpeft.check(model, x, **options)
    return str(caught.value)


def unused(net, x):
    return x
