"""Models that cannot be adapted, each with the reason and the next step."""

from __future__ import annotations

import torch
from torch import nn

from ..adapters.record import applied, require_model
from ..errors import MedpeftError

_SYNCHRONISED = ("DistributedDataParallel", "FSDPModule", "FullyShardedDataParallel")
"""Classes of torch that list a model's parameters once, when they wrap it."""


def refuse(model: nn.Module) -> None:
    """Raise if adapters cannot be added to a model.

    Either they would have no effect (compiled), or be added twice, or differ between ranks (synchronised).
    """
    require_model(model)
    _refuse_adapted(model)
    for name, module in model.named_modules():
        _refuse_compiled(model, name, module)
        _refuse_synchronised(model, name, module)
        lazy = isinstance(module, nn.modules.lazy.LazyModuleMixin)
        if lazy and module.has_uninitialized_params():
            raise MedpeftError(f"{name} has no shape yet: run the model once, then apply.")
        if hasattr(module, "adapters") and any(True for _ in module.parameters(recurse=False)):
            raise MedpeftError(
                f"{name} has an attribute 'adapters' already, which medpeft needs for its own."
            )


def _refuse_adapted(model: nn.Module) -> None:
    for name, module in model.named_modules():
        record = applied(module)
        if record is not None:
            raise MedpeftError(
                f"This {type(model).__name__}{f' ({name})' if name else ''} is adapted already, by "
                f"{record.name!r}: remove or merge that first, or apply both at once, as in 'lora+bias'."
            )


def _refuse_compiled(model: nn.Module, name: str, module: nn.Module) -> None:
    compiled = (
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
    )
    if compiled or isinstance(module, torch.jit.ScriptModule):
        raise MedpeftError(
            f"{name or type(model).__name__} is compiled, and a compiled model does not see adapters added "
            f"to it: apply first, then compile."
        )


def _refuse_synchronised(model: nn.Module, name: str, module: nn.Module) -> None:
    for cls in type(module).__mro__:
        if cls.__name__ in _SYNCHRONISED:
            raise MedpeftError(
                f"{name or type(model).__name__} is in {cls.__name__} already, which would not keep "
                f"adapters added now the same on all ranks: apply first, then shard or wrap."
            )
