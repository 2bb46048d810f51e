"""BatchNorm statistics of a frozen backbone stay as they are, also when the user calls `model.train()`."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..architecture.layers import is_batchnorm


class StaysInEval:
    """Takes the place of a BatchNorm's `train`: notes the mode that is asked for and stays in eval."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.asked = layer, layer.training

    def __call__(self, mode: bool = True) -> nn.Module:
        """`layer.train(mode)`, which leaves it in eval."""
        self.asked = mode
        for child in self.layer.children():
            child.train(mode)
        self.layer.training = False
        return self.layer


def with_statistics(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every BatchNorm with running statistics, by name."""
    for name, module in model.named_modules():
        if is_batchnorm(module) and getattr(module, "running_mean", None) is not None:
            yield name, module


def freeze_statistics(model: nn.Module) -> None:
    """Keep every BatchNorm with running statistics in eval mode."""
    for _, layer in with_statistics(model):
        layer.__dict__["train"] = StaysInEval(layer)
        layer.training = False


def release_statistics(model: nn.Module) -> None:
    """Undo `freeze_statistics`: every BatchNorm is in the mode that was last asked for."""
    for layer in model.modules():
        stay = layer.__dict__.get("train")
        if isinstance(stay, StaysInEval):
            del layer.__dict__["train"]
            layer.training = stay.asked
