"""What a step costs, counted on fake tensors: operations, and the memory that waits for the backward; nothing is computed."""

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
        forward_flops: Operations of the forward: two for each multiply-add of a matrix product, convolution or attention.
        training_flops: Operations of forward and backward.
        saved_bytes: Bytes kept from forward to backward, parameters and buffers, which are there anyway, not counted.
    """

    forward_flops: int
    training_flops: int
    saved_bytes: int


def costs(model: nn.Module, example_input: Any) -> Costs:
    """Costs of one training step of a model as it is.

    Args:
        model: Any model, on any device; it is not touched.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs; only shapes and dtypes matter.

    Raises:
        MedpeftError: the model does not run on fake tensors.
    """
    with undisturbed():
        return on_fakes(_count, model, example_input)


def full_costs(model: nn.Module, example_input: Any) -> Costs:
    """Costs of one training step of the same model without its adapters, every parameter trainable.

    Raises:
        MedpeftError: nothing was applied, or the model does not run on fake tensors.
    """
    require_applied(model)
    with undisturbed():
        return on_fakes(_count_full, model, example_input)


def _count_full(twin: nn.Module, example: Any) -> Costs:
    uninstall(twin)
    release_statistics(twin)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return _count(twin, example)


def _count(twin: nn.Module, example: Any) -> Costs:
    twin.train()
    held = {_storage(tensor) for tensor in (*twin.parameters(), *twin.buffers())}
    saved: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Views of one tensor share its storage, which is kept once, and whole.
        if _storage(tensor) not in held:
            saved[_storage(tensor)] = tensor.untyped_storage()
        return tensor

    with Flops() as flops:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [out for out in run(twin, example) if out.requires_grad]
        forward, size = flops.total, sum(storage.nbytes() for storage in saved.values())
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(out) for out in outputs])
    return Costs(forward, flops.total, size)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Flops(TorchDispatchMode):
    """Counts the operations that run inside it, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        # Imported here because it takes longer than all of medpeft.
        from torch.utils.flop_counter import addmm_flop, baddbmm_flop, flop_registry

        aten = torch.ops.aten
        self.formulas = {**flop_registry, aten.addmm_: addmm_flop, aten.baddbmm_: baddbmm_flop}
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        formula = self.formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=output))
        return output
