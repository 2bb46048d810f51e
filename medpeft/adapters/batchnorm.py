"""Frozen BatchNorm statistics: they stay as they are, also when the user calls `model.train()`.

`torch.optim.swa_utils.update_bn` also resets them before it estimates them anew: frozen ones are not reset.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ..architecture.layers import is_batchnorm
from ..architecture.network import Network


class StaysInEval:
    """A BatchNorm's `train` that notes the requested mode and keeps the layer in eval mode."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.asked = layer, layer.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """Note the mode, pass it on to the layer's children, and keep the layer in eval mode."""
        self.asked = mode
        for child in self.layer.children():
            child.train(mode)
        self.layer.training = False
        return self.layer


class KeepsStatistics:
    """A BatchNorm's `reset_running_stats` that resets nothing."""

    def __call__(self) -> None:
        """Do nothing."""


def with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every BatchNorm with running statistics, by name."""
    for name, module in model.named_modules():
        if is_batchnorm(module) and getattr(module, "running_mean", None) is not None:
            yield name, module


def statistics_names(network: Network) -> list[str]:
    """List the names of the buffers of every BatchNorm with running statistics, in the network's depth."""
    names = []
    for layer_name, layer in with_statistics(network.model):
        if not network.in_depth(layer_name) and not network.in_head(layer_name):
            continue
        for buffer_name, _ in layer.named_buffers(recurse=False):
            names.append(f"{layer_name}.{buffer_name}".lstrip("."))
    return names


def freeze_statistics(model: nn.Module, adapting: Collection[str]) -> None:
    """Keep every BatchNorm with running statistics in eval mode, and its statistics as they are.

    Args:
        model: The model.
        adapting: Names of the buffers of those BatchNorms that adapt, and are left alone.
    """
    for name, layer in with_statistics(model):
        if f"{name}.running_mean".lstrip(".") in adapting:
            continue
        layer.__dict__["train"] = StaysInEval(layer)
        layer.__dict__["reset_running_stats"] = KeepsStatistics()
        layer.training = False


def release_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`: put every BatchNorm in the mode that was last requested."""
    for layer in model.modules():
        stay = layer.__dict__.get("train")
        if isinstance(stay, StaysInEval):
            layer.training = stay.asked
            layer.__dict__.pop("reset_running_stats", None)
            del layer.__dict__["train"]
