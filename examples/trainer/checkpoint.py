"""A checkpoint of a run, from which it goes on bit for bit, also on another number of devices.

What a run draws at random is a function of its seed, epoch and step (`order.py`): the position is the state of every
generator.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR


@dataclass
class Training:
    """A model on its way: all that a checkpoint has to hold.

    Attributes:
        model: the adapted model, on its device; FSDP2 shards it in place.
        network: what is called to train: the model, or its head on cached features, as Fabric set it up.
        optimizer: over its trainable parameters.
        schedule: stepped after every batch.
        scaler: of the gradients, for 16-bit floats.
        history: one record an epoch: `train_loss`, `val_loss`, `val_macro_f1`, `seconds`.
        best: the trained state with the highest validation macro-F1 so far, on the CPU.
        best_epoch: its epoch, counted from 1.
        step: steps done in the epoch that has begun.
        loss: (2,) sum of the losses of its images on this process, and of their weights over all.
        step_seconds: how long each optimizer step took, without waiting for its images.
    """

    model: nn.Module
    network: _FabricModule
    optimizer: _FabricOptimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    step: int = 0
    loss: Tensor = field(default_factory=lambda: torch.zeros(2))
    step_seconds: list[float] = field(default_factory=list)


def whole(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU; one that is sharded is gathered, on every process."""
    found = tensor.detach()
    if isinstance(found, DTensor):
        found = found.full_tensor()
    return found.to("cpu", copy=True)


def gathered(fabric: Fabric, tensor: Tensor) -> Tensor:
    """Stack the tensors of all processes, of one shape, in the order of their ranks."""
    found = [torch.empty_like(tensor) for _ in range(fabric.world_size)]
    if fabric.world_size == 1:
        return tensor[None]
    torch.distributed.all_gather(found, tensor.contiguous())
    return torch.stack(found)


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes, the trainable parameters and the buffers, to the CPU."""
    state = model.state_dict(keep_vars=True).items()
    return {k: whole(v) for k, v in state if v.requires_grad or not isinstance(v, nn.Parameter)}


@torch.no_grad()
def restore_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `trained_state` copied."""
    own = model.state_dict(keep_vars=True)
    for name, value in state.items():
        own[name].copy_(_placed(value, own[name]))


def save_training(fabric: Fabric, training: Training, settings: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, called on every process; a crash while writing leaves the one before."""
    content = {
        "settings": settings,
        "model": trained_state(training.model),
        "optimizer": _mapped(training.optimizer.state_dict(), whole),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict() if training.scaler else None,
        "history": training.history,
        "best": training.best,
        "best_epoch": training.best_epoch,
        "step": training.step,
        "losses": gathered(fabric, training.loss).cpu(),
        "step_seconds": training.step_seconds,
    }
    if fabric.is_global_zero:
        unfinished = path.with_suffix(".unfinished")
        with unfinished.open("wb") as opened:
            torch.save(content, opened)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(unfinished, path)


def load_training(path: Path) -> dict[str, Any]:
    """Read a checkpoint, with the `settings` of the run that wrote it."""
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def restore_training(fabric: Fabric, training: Training, content: dict[str, Any]) -> None:
    """Go on from where a checkpoint was written."""
    restore_state(training.model, content["model"])
    training.optimizer.load_state_dict(_sharded(training.optimizer, content["optimizer"]))
    training.schedule.load_state_dict(content["schedule"])
    if training.scaler:
        training.scaler.load_state_dict(content["scaler"])
    training.history, training.best = content["history"], content["best"]
    training.best_epoch, training.step = content["best_epoch"], content["step"]
    training.step_seconds = content["step_seconds"]
    training.loss = _share(content["losses"], fabric.global_rank, fabric.world_size).to(fabric.device)


def _share(losses: Tensor, rank: int, world: int) -> Tensor:
    """Give this process its sum of losses; with another number of processes, the first takes all."""
    if len(losses) == world:
        return losses[rank].clone()
    total = torch.stack([losses[:, 0].sum(), losses[0, 1]])
    return total if rank == 0 else total * torch.tensor([0.0, 1.0])


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """Lay a whole tensor out as another one is."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _sharded(optimizer: _FabricOptimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Shard the optimizer's tensors as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        i: {k: _placed(v, parameters[i]) if v.shape == parameters[i].shape else v for k, v in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": states}


def _mapped(value: Any, change: Any) -> Any:
    """Apply a function to every tensor at any depth."""
    if isinstance(value, dict):
        return {k: _mapped(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [_mapped(v, change) for v in value]
    return change(value) if isinstance(value, Tensor) else value
