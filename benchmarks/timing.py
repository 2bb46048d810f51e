"""Timing several steps in turn, so that what disturbs the machine disturbs them all; every round gives a ratio to the first."""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Step = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser, *, batch: int = 8, repeats: int = 7) -> None:
    """Declare the flags that every benchmark has."""
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision (default: float32)")
    parser.add_argument("--compile", action="store_true", help="run every model through torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")


def precision(args: argparse.Namespace) -> Any:
    """The autocast that the flags ask for."""
    if args.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.autocast))


def compiled(model: nn.Module, args: argparse.Namespace) -> Callable[..., Any]:
    """The model, compiled if the flags ask for it."""
    return torch.compile(model) if args.compile else model


def interleaved(steps: Mapping[str, Step], repeats: int, device: str, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of every step, round by round; on a CPU those of the process, which other processes disturb least."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {case: [] for case in steps}
    for _ in range(repeats):
        for case, step in steps.items():
            seconds[case].append(timed(step, device))
    return seconds


def timed(step: Step, device: str) -> float:
    """Seconds of one call."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Of every case the median and range of its ratio to the first case of the same round, and its median seconds."""
    base = next(iter(seconds.values()))
    found = {}
    for case, own in seconds.items():
        each = sorted(a / b for a, b in zip(own, base, strict=True))
        found[case] = {
            "ratio": statistics.median(each),
            "ratio_range": [each[0], each[-1]],
            "seconds": statistics.median(own),
        }
    return found


def bytes_kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps for backward, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())  # So that no address is given out twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    total = sum(storages.values())
    value.backward()
    return total


def where(args: argparse.Namespace) -> str:
    """What the figures were measured on, in one line."""
    extras = [args.autocast or "float32", *(["torch.compile"] if args.compile else [])]
    machine = torch.cuda.get_device_name() if args.device != "cpu" else f"{platform.machine()} CPU, {args.threads} threads"
    return f"batch {args.batch}, {args.image_size} px, {', '.join(extras)}, {machine}, torch {torch.__version__}"
