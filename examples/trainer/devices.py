"""Where a run computes, by Lightning Fabric: one device or several (DDP, FSDP2), and in which precision."""

import argparse
import logging
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from .errors import TrainerError

STRATEGIES = ("auto", "ddp", "fsdp2")
PRECISIONS = ("32", "bf16-mixed", "16-mixed")


def make_fabric(args: argparse.Namespace) -> tuple[Fabric, torch.amp.GradScaler | None]:
    """Start the processes that the flags ask for, unless torchrun has started them.

    Returns:
        The fabric, and the scaler of the gradients where the precision needs one: it is part of a checkpoint.

    Raises:
        TrainerError: the precision, the devices or the batch size do not fit.
    """
    if args.precision == "16-mixed" and not (
        torch.cuda.is_available() and args.accelerator in ("auto", "cuda")
    ):
        raise TrainerError(
            "--precision 16-mixed needs a CUDA GPU: the gradients are scaled there. Elsewhere take bf16-mixed."
        )
    if args.quiet:
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    strategy: Any = args.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(shard, data_parallel_size=args.devices, tensor_parallel_size=1)
    scaler = torch.amp.GradScaler("cuda") if args.precision == "16-mixed" else None
    # Given as a plugin, whose scaler can be saved; Fabric's own stays hidden.
    how: dict[str, Any] = (
        {"plugins": MixedPrecision("16-mixed", "cuda", scaler)} if scaler else {"precision": args.precision}
    )
    try:
        fabric = Fabric(accelerator=args.accelerator, strategy=strategy, devices=args.devices, **how)
    except (ValueError, RuntimeError) as error:
        raise TrainerError(
            f"--accelerator {args.accelerator} --devices {args.devices} cannot be had: {error}"
        ) from error
    fabric.launch()
    check_batch(args.batch_size, args.accumulate, fabric.world_size)
    return fabric, scaler


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Raise a TrainerError unless a batch divides evenly: `--batch-size` counts the images of a whole optimizer step."""
    if batch_size % (accumulate * devices):
        raise TrainerError(
            f"--batch-size {batch_size} is the images of one optimizer step, and does not divide by "
            f"--accumulate {accumulate} × {devices} devices. Take a multiple of {accumulate * devices}."
        )


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard the blocks of a model one by one, then what is left of it: only one block at a time is whole in memory."""
    for child in model.children():
        if isinstance(child, (nn.Sequential, nn.ModuleList)):
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model
