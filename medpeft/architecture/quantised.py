"""Weights that torchao or bitsandbytes has quantised: told from others, and seen as their shape alone.

Their numbers are integers with scales, packed by each library in its own way. A layer runs on them, and an
adapter on the layer's input or output trains beside it; what reads or changes the numbers cannot.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_quantised(layer: nn.Module, name: str = "weight") -> bool:
    """Whether a tensor of the layer's own is of integers, is packed, or is a type that stands for both."""
    tensor = layer._parameters.get(name)
    if tensor is None:
        return False
    return holds_integers(tensor) or (name == "weight" and _is_packed(layer, tensor))


def _is_packed(layer: nn.Module, weight: Tensor) -> bool:
    """Whether a linear layer's weight has another shape than the layer computes with."""
    if not isinstance(layer, nn.Linear) or isinstance(weight, nn.UninitializedParameter):
        return False
    return tuple(weight.shape) != (layer.out_features, layer.in_features)


def holds_integers(tensor: Tensor) -> bool:
    """Whether a tensor is of integers, or of a type that is made of other tensors, as torchao's."""
    if tensor.is_quantized or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    is_shard = hasattr(tensor, "device_mesh")  # FSDP2's type is made of others too.
    return hasattr(tensor, "__tensor_flatten__") and not is_shard


def shape_alone(layer: nn.Module, tensor: Tensor) -> Tensor:
    """Stand in for a quantised tensor by one without values, in the shape that the layer computes with."""
    shape = tuple(tensor.shape)
    if isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    return torch.empty(shape, dtype=dtype, device="meta")


def unpack(model: nn.Module) -> None:
    """Undo what bitsandbytes does to 4-bit weights in inference on some CPUs: it packs them in another order.

    Writing a state_dict brings its own order back, by which a base is recognised.
    """
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()
