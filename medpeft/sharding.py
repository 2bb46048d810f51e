"""Models sharded by FSDP2: every rank holds a part of each tensor, and the whole only in a forward."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a rank's part of a larger one."""
    return hasattr(tensor, "device_mesh")


def reshard(model: nn.Module) -> None:
    """Put the shards back in place of the whole tensors that a forward pass left.

    After a forward without backward, the outermost module still holds whole tensors. Writes to them are lost.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # Not imported by anyone: nothing is sharded.
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """Gather the whole of a tensor, detached. If it is sharded, every rank has to call this."""
    detached = tensor.detach()
    gather: Any = getattr(detached, "full_tensor", None)
    if gather is None:
        return detached
    full: Tensor = gather()
    return full


def like(value: Tensor, target: Tensor) -> Tensor:
    """Give a value the dtype and the shards of a tensor. If that is sharded, every rank has to call this."""
    value = value.to(target.dtype)
    if not is_sharded(target) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = target.device_mesh, target.placements  # type: ignore[attr-defined]  # a DTensor's
    return distribute_tensor(value.to(target.device), mesh, placements)


def is_first(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes: of the ranks that share a model the first, else every one."""
    for tensor in tensors:
        mesh: Any = getattr(tensor, "device_mesh", None)
        if mesh is not None and any(mesh.get_coordinate() or ()):
            return False
    return True


@contextmanager
def gathered(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put whole tensors in place of the modules' own shards for the duration of a `with` block.

    The shards of the modules below them stay.
    """
    shards: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in modules:
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if is_sharded(tensor):
                    shards.append((store, name, tensor))
    try:
        for store, name, shard in shards:
            store[name] = nn.Parameter(whole(shard), requires_grad=False)
        yield
    finally:
        for store, name, shard in shards:
            store[name] = shard
