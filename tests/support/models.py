"""Tiny models of every supported family with random weights, shared by all tests.

Fresh models hide mistakes: zero gammas at the end of a residual branch, LayerScale at 1e-5 and zero biases make an adapter's
effect and its gradients vanish. So every parameter and every running statistic is drawn anew.
"""

import warnings
from functools import cache

import torch
from families import SelfAttention as SelfAttention
from family import CLASSES as CLASSES
from family import FAMILIES as FAMILIES
from mold import Mold
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter and running statistic anew: gains around 1, matrices of unit gain, nothing zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        drawn = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.ndim == 2 or p.numel() > max(p.shape, default=1):
            drawn /= (p.numel() / p.shape[0]) ** 0.5
        else:
            drawn = 0.2 * drawn + (0.0 if "bias" in name or "token" in name else 0.8)
        p.copy_(drawn)
    for name, b in model.named_buffers():
        if name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=generator, dtype=torch.float64))
        elif name.endswith("running_mean"):
            b.copy_(0.2 * torch.randn(b.shape, generator=generator, dtype=torch.float64))
    return model


@torch.no_grad()
def randomise_adapters(model: nn.Module, size: float = 0.1, seed: int = 1) -> nn.Module:
    """Move every parameter of every adapter away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.startswith("adapters.") or ".adapters." in name:
            p.add_(
                size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device, p.dtype)
            )
    return model


@cache
def _mold(name: str, dtype: torch.dtype) -> Mold:
    with (
        warnings.catch_warnings()
    ):  # What libraries warn about while they are imported and built is not ours.
        warnings.simplefilter("ignore")
        return Mold(randomise(FAMILIES[name].build().to(dtype)).eval())


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A new model of a family, the same each time, in eval mode."""
    return _mold(name, dtype).cast().eval()


def example(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input for a family, the same each time."""
    generator = torch.Generator().manual_seed(2)
    shape = FAMILIES[name].shape
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@cache
def _mold_on_meta(architecture: str, classes: int) -> Mold:
    import timm

    with torch.device("meta"):
        return Mold(timm.create_model(architecture, num_classes=classes))


def on_meta(architecture: str, classes: int = CLASSES) -> nn.Module:
    """A new model of timm in its full size, without values."""
    return _mold_on_meta(architecture, classes).cast()


def first(returned) -> Tensor:
    """The first tensor of what a model returns."""
    while not isinstance(returned, Tensor):
        returned = returned[0]
    return returned


def output(model: nn.Module, x: Tensor) -> Tensor:
    """The first tensor that a model returns."""
    return first(model(x))
