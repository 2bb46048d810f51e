"""One adapted layer, and what its formula gives, in NumPy and float64."""

import numpy as np
import torch
from models import randomise, randomise_adapters
from torch import nn

import medpeft


def applied(layer, method, dtype=torch.float64, **options):
    """The layer alone as a model, adapted, with random weights and adapters: (layer, adapter as numpy arrays)."""
    model = nn.Sequential(layer).to(dtype).eval()
    randomise(model)
    medpeft.apply(
        model, method, head=None, **({"target": "*"} if method in ("tsa", "lora") else {}), **options
    )
    randomise_adapters(model, size=0.3)
    (adapter,) = (m for m in layer.adapters.children())
    values = {name: p.detach().numpy() for name, p in adapter.named_parameters()}
    return model, adapter, values


def numbers(layer):
    return (
        layer.weight.detach().numpy(),
        0.0 if layer.bias is None else layer.bias.detach().numpy(),
    )


def drawn(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_computes(model, x, expected):
    with torch.no_grad():
        got = model(x).numpy()
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def convolved(x, weight, stride=1, padding=0, dilation=1, groups=1):
    """A 2-d convolution as a loop over groups and taps."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    outputs, inputs, k, _ = weight.shape
    height, width = ((size - dilation * (k - 1) - 1) // stride + 1 for size in x.shape[2:])
    y = np.zeros((len(x), outputs, height, width))
    for g in range(groups):
        rows = slice(g * outputs // groups, (g + 1) * outputs // groups)
        part = x[:, g * inputs : (g + 1) * inputs]
        for i in range(k):
            for j in range(k):
                rows_seen = slice(i * dilation, i * dilation + stride * (height - 1) + 1, stride)
                cols_seen = slice(j * dilation, j * dilation + stride * (width - 1) + 1, stride)
                y[:, rows] += np.einsum(
                    "oi,nihw->nohw", weight[rows, :, i, j], part[:, :, rows_seen, cols_seen]
                )
    return y


GEOMETRIES = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2},
    {"kernel_size": 5, "padding": 2, "groups": 4, "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 2},
]


def base_convolution(conv, x):
    weight, bias = numbers(conv)
    geometry = {
        "stride": conv.stride[0],
        "padding": conv.padding[0],
        "dilation": conv.dilation[0],
        "groups": conv.groups,
    }
    return convolved(x.numpy(), weight, **geometry) + np.reshape(bias, (-1, 1, 1)) * np.ones(
        (conv.out_channels, 1, 1)
    )
