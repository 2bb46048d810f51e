"""Weights that cannot be merged, each with the reason and, where there is one, the next step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..architecture.layers import is_computed, own_tensor, way_back
from ..architecture.quantised import is_quantised
from ..errors import MedpeftError, require
from ..sharding import whole


class Place(NamedTuple):
    """Where a tensor's elements are in memory: addresses from `start` up to `end`."""

    start: int
    end: int

    def overlaps(self, other: Place) -> bool:
        """Whether two tensors may share elements."""
        return self.start < other.end and other.start < self.end


def places(model: nn.Module) -> dict[str, Place]:
    """Map the name of every parameter, in distinct modules, to its place in memory: tied ones overlap."""
    found: dict[str, Place] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"{module_name}.{name}".lstrip(".")] = _place(parameter)
    return found


def _place(tensor: Tensor) -> Place:
    """Find a tensor's place; one without memory of its own, such as a meta tensor, is where its object is."""
    address = 0
    if type(tensor.data) is Tensor and tensor.layout == torch.strided:
        address = tensor.data_ptr()
    if address == 0:
        return Place(-id(tensor), -id(tensor) + 1)
    last = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * stride
    return Place(address, address + (last + 1) * tensor.element_size())


def require_floating(layer: nn.Module) -> None:
    """Raise `MedpeftError` for a layer whose weight is of integers or quantised."""
    weight = own_tensor(layer, "weight")
    if weight is None:
        return
    require(
        not is_quantised(layer),
        f"its weight is quantised or of integers ({type(weight).__name__} of {weight.dtype}), which would "
        "round the update away: save the adapters, load them into the base as it was before it was "
        "quantised, with check_base=False, merge there, then quantise",
    )


def require_own(layer: nn.Module, names: Iterable[str]) -> None:
    """Raise `MedpeftError` for a layer whose tensors are computed in every forward since `apply`."""
    for name in names:
        if name and is_computed(layer, name):
            raise MedpeftError(
                f"its {name} is computed in every forward since apply: {way_back(layer, name)}"
            )


def reason_against(full_name: str, own: Tensor, value: Tensor, others: dict[str, Place]) -> str:
    """Reason why a merged value cannot be written into a layer's own tensor, "" if it can.

    Args:
        full_name: Name of the tensor in the model.
        own: The layer's own tensor.
        value: The merged value, sharded as the layer's own.
        others: The places of all parameters of the model.
    """
    name = full_name.rpartition(".")[2]
    if own.is_inference() and not torch.is_inference_mode_enabled():
        return (
            f"its {name} was made under torch.inference_mode, so nothing can be written into it: "
            "clone it first"
        )
    for size, stride in zip(own.shape, own.stride(), strict=True):
        if size > 1 and stride == 0:
            return f"its {name} is an expanded view, whose elements share memory: make it contiguous first"
    place = _place(own)
    for other_name, other in others.items():
        if other_name != full_name and other.overlaps(place):
            return f"its {name} is tied to {other_name}, which has no such adapter"
    if not value.is_meta and not bool(torch.isfinite(whole(value)).all()):
        return f"its merged {name} would hold NaN or infinite values: did the training diverge?"
    return ""
