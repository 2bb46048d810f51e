"""A block with one Conv-Adapter in it, and what that adds, in NumPy and float64."""

import copy

import numpy as np
import torch
from by_hand import numbers
from layer_oracles import convolved
from models import randomise, randomise_adapters

import medpeft
from medpeft.formulas.conv_adapter import ConvAdapter


def adapted_block(model, name, **options):
    """The block of a model with random weights and adapters, its adapter's numbers, and its plain copy."""
    randomise(model.double().eval())
    plain = copy.deepcopy(model.get_submodule(name))
    medpeft.apply(model, "conv_adapter", reduction=2, **options)
    randomise_adapters(model, size=0.3)
    block = model.get_submodule(name)
    (adapter,) = (m for m in block.modules() if isinstance(m, ConvAdapter))
    return block, plain, numbers(adapter)


def bottleneck(p, x, act, stride=1, padding=1):
    """α ⊙ up(act(down(x))) in NumPy."""
    hidden = act(convolved(x, p["down"], stride=stride, padding=padding, groups=len(p["down"])))
    return torch.from_numpy(p["scale"][:, None, None] * np.einsum("oh,nhij->noij", p["up"], hidden))
