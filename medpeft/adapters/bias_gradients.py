"""The gradient of a convolution's bias without the gradient of its weight: a sum over the output's gradient.

On a CPU, torch's kernel computes both gradients together, also if the weight is frozen: training the biases
of a UNet took as long as training all of it. So the layer runs with a bias that is detached from autograd,
and the output passes its gradient on to the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from .in_place import eager
from .kernels import sum_to_bias
from .stand_in import run_with

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def trains_apart(layer: nn.Module) -> bool:
    """Whether the layer is a convolution of torch's own whose bias trains alone."""
    stock = any(type(layer).forward is conv.forward for conv in _CONVS)
    return stock and "forward" not in layer.__dict__ and _lone_bias(layer) is not None


def run_apart(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a convolution, with its bias apart if that saves the weight's gradient."""
    x = args[0] if args else next(iter(kwargs.values()), None)
    bias = _lone_bias(layer) if _costs_the_weight(x) else None
    if bias is None:
        return run_with(layer, {}, None, args, kwargs)
    output = run_with(layer, {"": {"bias": bias.detach()}}, None, args, kwargs)
    channel_axis = -1 - len(layer.kernel_size)  # type: ignore[arg-type]  # a convolution
    return sum_to_bias(output, bias, channel_axis)


def _lone_bias(layer: nn.Module) -> Tensor | None:
    """Return the bias if it trains while the weight is frozen."""
    weight, bias = own_tensor(layer, "weight"), own_tensor(layer, "bias")
    if weight is None or bias is None or weight.requires_grad or not bias.requires_grad:
        return None
    return bias


def _costs_the_weight(x: Any) -> bool:
    """Whether torch would compute the weight's gradient too: in eager mode on a CPU, in full precision."""
    return isinstance(x, Tensor) and x.device.type == "cpu" and torch.is_grad_enabled() and eager(x)
