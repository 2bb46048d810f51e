"""A convolution's bias that trains while the weight is frozen gets its gradient by a sum.

torch's kernel on a CPU computes a bias's gradient together with the weight's, which nobody wants: training the biases of a
UNet took as long as training all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from .adapter import Adapters
from .forward import Cover
from .kernels import SumToBias, eager

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Apart(Cover):
    """Has the layer compute with its bias cut off from autograd, and then hands the gradient of the output on to it."""

    def hides(self, layer: nn.Module, x: Any) -> Mapping[str, Tensor | None]:
        """The bias, detached, where that spares the weight's gradient."""
        bias = _lone_bias(layer, x)
        return {} if bias is None else {"bias": bias.detach()}

    def hand_on(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook: tie the output to the bias again."""
        bias = _lone_bias(layer, args[0] if args else next(iter(kwargs.values()), None))
        if bias is None:
            return output
        tied: Tensor = SumToBias.apply(output, bias, -1 - len(layer.kernel_size))  # type: ignore[arg-type]  # a convolution
        return tied


def sum_to_biases(model: nn.Module) -> None:
    """Hook every convolution of torch's own whose bias trains alone; `hooks.detach` undoes it."""
    for layer in model.modules():
        stock = any(type(layer).forward is conv.forward for conv in _CONVS)
        if stock and not isinstance(layer._modules.get("adapters"), Adapters) and _trains_alone(layer) is not None:
            apart = Apart("")
            layer.register_forward_pre_hook(apart.put, with_kwargs=True)
            layer.register_forward_hook(apart.hand_on, with_kwargs=True)
            layer.register_forward_hook(apart.take, always_call=True)


def _trains_alone(layer: nn.Module) -> Tensor | None:
    """The bias, if it trains while the weight is frozen."""
    weight, bias = own_tensor(layer, "weight"), own_tensor(layer, "bias")
    return bias if bias is not None and bias.requires_grad and weight is not None and not weight.requires_grad else None


def _lone_bias(layer: nn.Module, x: Any) -> Tensor | None:
    """The bias, if its gradient would cost the weight's for this input: eager mode on a CPU, in full precision."""
    costly = isinstance(x, Tensor) and x.device.type == "cpu" and torch.is_grad_enabled() and eager(x)
    return _trains_alone(layer) if costly else None
