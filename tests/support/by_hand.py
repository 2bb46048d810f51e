"""What formulas with bottlenecks are written out by hand with, in NumPy."""

import copy

import numpy as np
import torch
from models import make, randomise_adapters

import medpeft


def numbers(adapter):
    return {
        name.replace("bottleneck.", ""): value.detach().numpy() for name, value in adapter.named_parameters()
    }


def gelu(x):
    return torch.nn.functional.gelu(torch.from_numpy(x)).numpy()


def relu(x):
    return np.maximum(x, 0)


def through(p, x, act):
    """up(act(down(x))) of a bottleneck's numbers."""
    return act(x @ p["down"].T + p["down_bias"]) @ p["up"].T + p["up_bias"]


def block_and_adapters(family, method, **options):
    """An adapted model, a plain copy of its first block, and the numbers of that block's adapters by layer."""
    model = make(family)
    plain = copy.deepcopy(model.blocks[0])
    medpeft.apply(model, method, **options)
    randomise_adapters(model, size=0.3)
    found = {
        name: numbers(next(module.adapters.children()))
        for name, module in model.blocks[0].named_modules()
        if "adapters" in module._modules
    }
    return model, plain, found
