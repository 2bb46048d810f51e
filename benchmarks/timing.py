"""Timing several steps in turn, so that a disturbance of the machine hits all of them.

Every round gives each step's ratio to the first step of the same round.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Step = Callable[[], object]
Case = TypeVar("Case", bound=Hashable)


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    batch: int = 8,
    repeats: int | None = 7,
    image_size: int | None = 224,
) -> None:
    """Declare the flags that every benchmark has."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help="images a step")
    parser.add_argument(
        "--image-size", type=int, default=image_size, metavar="N", help="pixels along each side"
    )
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help="rounds")
    parser.add_argument("--threads", type=int, default=1, metavar="N")
    parser.add_argument("--device", default=device)
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision, not float32")
    parser.add_argument("--compile", action="store_true", help="run every model through torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")


def precision(args: argparse.Namespace) -> Any:
    """Enter the autocast that the flags ask for."""
    if args.autocast is None:
        return nullcontext()
    return torch.autocast(torch.device(args.device).type, getattr(torch, args.autocast))


def compiled(model: nn.Module, args: argparse.Namespace) -> Callable[..., Any]:
    """Compile the model, if the flags ask for it."""
    if args.compile:
        return torch.compile(model)
    return model


def interleaved(
    steps: Mapping[Case, Step],
    repeats: int,
    device: str,
    warmup: int = 1,
) -> dict[Case, list[float]]:
    """Measure the seconds of every step, round by round."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[Case, list[float]] = {case: [] for case in steps}
    for _ in range(repeats):
        for case, step in steps.items():
            seconds[case].append(timed(step, device))
    return seconds


def timed(step: Step, device: str) -> float:
    """Measure the seconds of one call.

    On one thread of a CPU those of the process, which other processes disturb least. Those of several threads
    would be added up, so there it is the time on the clock, as on a GPU.
    """
    if device == "cpu" and torch.get_num_threads() == 1:
        start = time.process_time()
        step()
        return time.process_time() - start
    wait_for(device)
    start = time.perf_counter()
    step()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Compare every case with the first: median and range of the ratios within a round, median seconds."""
    first = next(iter(seconds.values()))
    figures = {}
    for case, times in seconds.items():
        by_round = sorted(time / reference for time, reference in zip(times, first, strict=True))
        figures[case] = {
            "ratio": statistics.median(by_round),
            "ratio_range": [by_round[0], by_round[-1]],
            "seconds": statistics.median(times),
        }
    return figures


def bytes_kept(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Count the bytes that autograd keeps for backward, without the model's own tensors."""
    of_model = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    kept_alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_model:
            storages[storage.data_ptr()] = storage.nbytes()
            kept_alive.append(tensor.detach())  # So that no address is given out twice.
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
    total = sum(storages.values())
    value.backward()
    return total


def where(args: argparse.Namespace, image_sizes: object = None) -> str:
    """Describe the settings, the machine and the version of torch in one line."""
    machine = f"{platform.machine()} CPU, {args.threads} threads"
    if args.device != "cpu":
        machine = torch.cuda.get_device_name()
    settings = [f"batch {args.batch}", f"{image_sizes or args.image_size} px", args.autocast or "float32"]
    if args.compile:
        settings.append("torch.compile")
    return ", ".join([*settings, machine, f"torch {torch.__version__}"])
