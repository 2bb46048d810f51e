"""The tensors of a layer as the adapters on its weight change them, for one forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.layers import own_tensor
from .adapter import Adapter, autocasts
from .adapters import Adapters


def adapted_tensors(
    layer: nn.Module, adapters: Adapters, x: Any = None, *, without: Adapter | None = None
) -> dict[str, Tensor]:
    """Compute the tensors of a layer that the adapters on its weight change, in the layer's own dtype.

    Args:
        layer: The layer.
        adapters: Its adapters.
        x: Its input, if that is known.
        without: An adapter to leave out, because it acts on the output this time.
    """
    on_weight: list[Any] = [adapters._modules[name] for name in adapters.order.on_weight]
    if without is not None:
        on_weight.remove(without)
    dtype, device = _dtype_and_device(layer, on_weight, x)
    if autocasts(device):
        # A weight is adapted in its own precision, as merging does.
        with torch.autocast(device, enabled=False):
            tensors = adapters.merged_tensors(layer, on_weight)
    else:
        tensors = adapters.merged_tensors(layer, on_weight)
    if dtype is not None:
        for name, tensor in tensors.items():
            if tensor.dtype != dtype:
                tensors[name] = tensor.to(dtype)
    return tensors


def _dtype_and_device(layer: nn.Module, on_weight: list[Adapter], x: Any) -> tuple[torch.dtype | None, str]:
    """Find the dtype and the device type of the tensors that adapters change.

    A norm without parameters has those of its input.
    """
    for adapter in on_weight:
        for name in (adapter._weight, adapter._bias):
            tensor = own_tensor(layer, name)
            if tensor is not None:
                return tensor.dtype, tensor.device.type
    if isinstance(x, Tensor):
        return (x.dtype if x.is_floating_point() else None), x.device.type
    return None, "cpu"
