"""Costs of a training step, counted on fake tensors: operations, and memory that waits for backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters.batchnorm import release_statistics
from ..adapters.record import require_applied
from ..checks.copies import on_fakes, run, undisturbed
from ..surgery.install import uninstall


@dataclass(frozen=True)
class Costs:
    """Costs of one step in train mode.

    Attributes:
        forward_flops: Operations of the forward: two for each multiply-add of a matrix product, convolution
            or attention.
        training_flops: Operations of forward and backward.
        saved_bytes: Bytes kept from forward to backward. Parameters and buffers do not count: they exist
            anyway.
    """

    forward_flops: int
    training_flops: int
    saved_bytes: int


def costs(model: nn.Module, example_input: Any) -> Costs:
    """Count the costs of one training step of a model as it is.

    Args:
        model: Any model, on any device; it is not touched.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs; values do not count.

    Raises:
        MedpeftError: the model does not run on fake tensors.
    """
    with undisturbed():
        return on_fakes(_count, model, example_input)


def full_costs(model: nn.Module, example_input: Any) -> Costs:
    """Count the costs of one training step of the model without its adapters, every parameter trainable.

    Raises:
        MedpeftError: nothing was applied, or the model does not run on fake tensors.
    """
    require_applied(model)
    with undisturbed():
        return on_fakes(_count_full, model, example_input)


def _count_full(model: nn.Module, example: Any) -> Costs:
    uninstall(model)
    release_statistics(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return _count(model, example)


def _count(model: nn.Module, example: Any) -> Costs:
    model.train()
    not_counted = set(map(storage_id, (*model.parameters(), *model.buffers())))
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one tensor share its storage, which is kept once, and whole.
        if storage_id(tensor) not in not_counted:
            saved[storage_id(tensor)] = tensor.untyped_storage()
        return tensor

    with Flops() as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [output for output in run(model, example) if output.requires_grad]
        forward_flops = flops.total
        saved_bytes = sum(storage.nbytes() for storage in saved.values())
        if outputs:
            torch.autograd.backward(outputs, list(map(torch.ones_like, outputs)))
    return Costs(forward_flops, flops.total, saved_bytes)


def storage_id(tensor: Tensor) -> int:
    """Return what tensors over one memory have in common."""
    return int(tensor.untyped_storage()._cdata)


class Flops(TorchDispatchMode):
    """Counts the operations that run inside it, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        # Imported here because it takes longer than all of medpeft.
        from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry

        aten = torch.ops.aten
        self.formulas = {**flop_registry, aten.addmm_: addmm_flop, aten.baddbmm_: baddbmm_flop}
        self.formulas[aten.convolution_backward] = _of_convolution
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=output))
        return output


def _of_convolution(
    grad: Tensor, x: Tensor, weight: Tensor, *others: Any, out_val: tuple[Tensor | None, ...]
) -> int:
    """Count the backward of a convolution: each gradient takes as many products as the forward.

    torch's own formula counts a weight's gradient as if there were no groups, too high by their number.
    """
    *_, transposed, _, _, wanted = others
    places = x if transposed else grad
    products = places.numel() * weight[0].numel()
    return 2 * products * (int(wanted[0]) + int(wanted[1]))
