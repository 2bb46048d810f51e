"""Residual blocks of convolutions: what follows a convolution in its block, and the block's activation.

A convolution's place in a block is read from the order in which modules are registered:

- its unit: the largest module around it that has no other layer, such as MONAI's `Convolution`
- its norm: the one that follows in the same parent; `norm1` for `conv1` where all norms come last
- the norm before it, in a block that normalises first: `norm1` of `conv1`, or the one that precedes
- its activation: the one that follows, or is in the norm (timm's `BatchNormAct2d`), or, before a further
  convolution, the only one of the parent. After the block's last convolution it acts on the sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .layers import (
    NOT_BODY,
    child_at,
    is_activation,
    is_conv,
    is_layernorm,
    is_norm,
    is_residual_block,
    kind_of,
    norm_channels,
    parents,
)

_CONVNEXT = re.compile(r"ConvNe[Xx]t\w*(Block|Layer)$|CNBlock$")
_INVERTED = re.compile(r"Inverted|MBConv|MbConv|EdgeResidual|DepthwiseSeparable")


@dataclass(frozen=True)
class Ends:
    """The first and the last convolution of a residual block, and the step of all its layers together."""

    first: _ConvNd
    last: _ConvNd
    stride: tuple[int, ...]


class ConvNextBlock(NamedTuple):
    """Names of two layers of a block of ConvNeXt: its depthwise convolution, and the first of its MLP."""

    depthwise: str
    mlp: str


def block_around(name: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the nearest residual block around a layer, "" if there is none."""
    for parent in parents(name):
        if is_residual_block(modules[parent]):
            return parent
    return ""


def is_inverted(block: nn.Module) -> bool:
    """Whether a residual block is wide inside and narrow outside, as EfficientNet's are, by its class."""
    return _INVERTED.search(type(block).__name__) is not None


def ends(block: nn.Module) -> Ends:
    """Find the convolutions at which a block begins and ends, beside its shortcut."""
    convs: list[_ConvNd] = []
    steps: list[Any] = []  # Pooling has one number for all axes.
    for name, module in block.named_modules():
        if NOT_BODY.search(name):
            continue
        if isinstance(module, _ConvNd):
            convs.append(module)
        if hasattr(module, "kernel_size") and hasattr(module, "stride"):
            steps.append(module.stride)
    first, last = convs[0], convs[-1]
    stride = [1] * len(first.kernel_size)
    for step in steps:
        for axis in range(len(stride)):
            stride[axis] *= step if isinstance(step, int) else step[axis]
    return Ends(first, last, tuple(stride))


def downsamples(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a convolution halves the image between stages, right after a norm, as ConvNeXt's do."""
    layer = modules[name]
    kernel = getattr(layer, "kernel_size", ())
    siblings = [module for module in modules[name.rpartition(".")[0]].children() if kind_of(module)]
    follows_norm = len(siblings) == 2 and is_layernorm(siblings[0]) and siblings[1] is layer
    return follows_norm and set(kernel) == {2} and tuple(kernel) == getattr(layer, "stride", ())


def convnext_blocks(modules: Mapping[str, nn.Module]) -> Iterator[ConvNextBlock]:
    """Yield the depthwise convolution of every block of ConvNeXt, and the first layer of its MLP."""
    for block, module in modules.items():
        if not _CONVNEXT.search(type(module).__name__):
            continue
        names = []
        for name, layer in module.named_modules(prefix=block):
            if kind_of(layer) in ("conv", "linear") and not NOT_BODY.search(name.removeprefix(block)):
                names.append(name)
        if len(names) > 1:
            yield ConvNextBlock(*names[:2])


def activation_of(module: nn.Module) -> nn.Module | None:
    """The first activation of a block or model that has no parameters, None without one."""
    for found in module.modules():
        if is_activation(found) and not list(found.parameters()):
            return found
    return None


def after(name: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the norm or activation after which a convolution's output is finished, "" for itself.

    A block that normalises before its convolutions finishes none of them. A LayerNorm, as ConvNeXt's,
    belongs to what follows.
    """
    if _normalises_first(modules[block]):
        return ""
    unit = _unit(name, block, modules)
    parent = unit.rpartition(".")[0]
    steps = list(_following(unit, parent, modules))
    is_last = not _convolves_later(unit, parent, modules)
    if is_last and parent == block:
        steps = [step for step in steps if not is_activation(modules[step])]
    elif not is_last and not any(_activates(modules[step]) for step in steps):
        steps += _only_activation(parent, modules)
    if not steps or is_layernorm(modules[steps[-1]]):
        return ""
    return steps[-1]


def before(name: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the norm from which a convolution gets its input, where the block normalises first; else ""."""
    if not _normalises_first(modules[block]):
        return ""
    unit = _unit(name, block, modules)
    parent = unit.rpartition(".")[0]
    number = re.fullmatch(r"conv(\d+)", unit.rpartition(".")[2])
    norm = ""
    for child, module in modules[parent].named_children():
        path = f"{parent}.{child}"
        if number is not None and is_norm(module) and re.fullmatch(rf"\D*{number[1]}", child):
            norm = path
            break
        if path == unit:
            break
        if is_norm(module):
            norm = path
        elif kind_of(module):
            norm = ""
    if norm and norm_channels(modules[norm]) != modules[name].in_channels:
        return ""
    return norm


def _normalises_first(block: nn.Module) -> bool:
    for name, layer in block.named_modules():
        if kind_of(layer) and not NOT_BODY.search(name):
            return is_norm(layer)
    return False


def _unit(name: str, block: str, modules: Mapping[str, nn.Module]) -> str:
    """Name of the largest module inside the block that has no layer but this convolution."""
    unit = name
    for parent in parents(name):
        layers = [module for module in modules[parent].modules() if kind_of(module)]
        if parent == block or len(layers) > 1:
            break
        unit = parent
    return unit


def _following(unit: str, parent: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the norm and then the activation that follow a unit in its parent, up to the next layer."""
    number = re.fullmatch(r"conv(\d+)", unit.rpartition(".")[2])
    steps: list[str] = []
    for place in _later(unit, parent, modules):
        module = modules[place]
        if is_norm(module) and not steps:
            steps.append(place)
        elif is_activation(module):
            steps.append(place)
            break
        elif kind_of(module):
            break
    if not steps and number is not None and child_at(modules[parent], f"norm{number[1]}") is not None:
        steps.append(f"{parent}.norm{number[1]}")
    # The activation inside a norm is called by it.
    yield from (place for place in steps if not any(is_norm(modules[around]) for around in parents(place)))


def _later(unit: str, parent: str, modules: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the modules registered after a unit in its parent, with those inside them, by name."""
    is_later = False
    for child, module in modules[parent].named_children():
        name = f"{parent}.{child}"
        if is_later and not NOT_BODY.search(child):
            yield from (path for path, _ in module.named_modules(prefix=name))
        is_later = is_later or name == unit


def _convolves_later(unit: str, parent: str, modules: Mapping[str, nn.Module]) -> bool:
    return any(is_conv(modules[name]) for name in _later(unit, parent, modules))


def _activates(module: nn.Module) -> bool:
    return any(map(is_activation, module.modules()))


def _only_activation(parent: str, modules: Mapping[str, nn.Module]) -> list[str]:
    """The activation that a parent calls after each of its convolutions, if it has no other."""
    names = []
    for child, module in modules[parent].named_children():
        if is_activation(module):
            names.append(f"{parent}.{child}")
    if len(names) == 1:
        return names
    return []
