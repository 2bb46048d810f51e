"""Models that FSDP2 shards: every rank holds a part of each tensor, and whole ones only while a module runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a rank's part of a larger one."""
    return hasattr(tensor, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Put the shards in place of the whole tensors that a forward pass left.

    The outermost module keeps those until its backward pass, which without gradients never comes; what is written to them is
    lost.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None:  # Not imported by anyone: nothing is sharded.
        for module in model.modules():
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded, detached; every rank has to take part."""
    gathered: Tensor = getattr(tensor.detach(), "full_tensor", tensor.detach)()
    return gathered


def like(value: Tensor, own: Tensor) -> Tensor:
    """The value in the dtype of the model's own tensor, and sharded as that is; of a sharded one every rank takes part."""
    value = value.to(own.dtype)
    if not is_sharded(own) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)  # type: ignore[attr-defined]


def is_first(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes: of the ranks that share a sharded model, the first; else always."""
    meshes: list[Any] = [tensor.device_mesh for tensor in tensors if hasattr(tensor, "device_mesh")]
    return all(not any(mesh.get_coordinate() or ()) for mesh in meshes)


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Whole tensors in place of the modules' own shards (not of those below them) for the duration of a `with` block."""
    stores: list[dict[str, Any]] = [store for m in modules for store in (m._parameters, m._buffers)]
    before = [(store, name, own) for store in stores for name, own in store.items() if is_sharded(own)]
    try:
        for store, name, own in before:
            store[name] = nn.Parameter(whole(own), requires_grad=False)
        yield
    finally:
        for store, name, own in before:
            store[name] = own


@torch.no_grad()
def overwrite(tensors: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Copy values into tensors; after an error all are as before.

    Args:
        tensors: A model's own tensors, each with its value in full or sharded as the tensor is.

    Returns:
        The tensors with what they held before: `overwrite` them with that to undo it.
    """
    pairs = [(own, like(value, own)) for own, value in tensors]
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for own, value in pairs:
            before.append((own, own.detach().clone()))
            own.copy_(value)
    except BaseException:
        for own, value in before:
            own.copy_(value)
        raise
    return before
