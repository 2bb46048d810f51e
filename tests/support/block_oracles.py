"""A transformer block by hand, in NumPy and float64, with the scales of some methods."""

import copy
import math

import numpy as np
import torch
from models import make, randomise, randomise_adapters
from torch import nn

import medpeft
from medpeft.adapters.adapter import parameters_of

WIDTH = 16


def drawn(*shape, seed=5):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alone(layer, method, **options):
    """The layer as a model of its own with random weights, adapted; then the values of its adapter, as NumPy arrays."""
    model = randomise(nn.Sequential(copy.deepcopy(layer)).double().eval())
    medpeft.apply(model, method, head=None, target="*", **options)
    randomise_adapters(model, size=0.3)
    ((_, adapter),) = model[0].adapters.adapters()
    return model, {name.rpartition(".")[2]: p.detach().numpy() for name, p in parameters_of(adapter)}


def weights(layer):
    bias = None if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy(), bias


def assert_same(got, expected):
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else got
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-12 * np.abs(expected).max()


def adapted_vit(method, **options):
    """A tiny ViT, adapted with random values, and its first block's base weights as NumPy arrays."""
    model = make("vit")
    base = {name: p.detach().numpy().copy() for name, p in model.blocks[0].named_parameters()}
    medpeft.apply(model, method, **options)
    return randomise_adapters(model, size=0.3), base


def merged_weights(model):
    with medpeft.merged(model):
        return {
            name: p.detach().numpy().copy()
            for name, p in model.named_parameters()
            if ".adapters." not in name
        }


def normalised(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weight + bias


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def block(x, w, k_scale=1.0, v_scale=1.0, hidden_scale=1.0, gammas=(1.0, 1.0), heads=2):
    """A pre-norm ViT block by hand, with the scales of (IA)³ and DiffFit."""
    qkv = normalised(x, w["norm1.weight"], w["norm1.bias"]) @ w["attn.qkv.weight"].T + w["attn.qkv.bias"]
    q, k, v = np.split(qkv, 3, -1)
    q, k, v = (np.stack(np.split(part, heads, -1), 1) for part in (q, k * k_scale, v * v_scale))
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    attended = np.concatenate(np.moveaxis(scores / scores.sum(-1, keepdims=True) @ v, 1, 0), -1)
    x = x + gammas[0] * (attended @ w["attn.proj.weight"].T + w["attn.proj.bias"])
    hidden = gelu(
        normalised(x, w["norm2.weight"], w["norm2.bias"]) @ w["mlp.fc1.weight"].T + w["mlp.fc1.bias"]
    )
    return x + gammas[1] * ((hidden_scale * hidden) @ w["mlp.fc2.weight"].T + w["mlp.fc2.bias"])


LAYERS = [nn.Linear(12, 8), nn.Linear(8, 12, bias=False), nn.Conv2d(8, 6, 1, stride=2)]


def output_of(layer, x, weight, bias):
    """A linear layer or 1×1 convolution with another weight and bias, over NumPy arrays."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T + (0.0 if bias is None else bias)
    steps = x[:, :, :: layer.stride[0], :: layer.stride[1]]
    return np.einsum("oi,nihw->nohw", weight[..., 0, 0], steps) + bias[:, None, None]


def input_for(layer):
    return drawn(3, layer.in_features) if isinstance(layer, nn.Linear) else drawn(2, layer.in_channels, 5, 4)
