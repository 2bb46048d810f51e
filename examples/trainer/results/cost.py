"""What a run cost: its peak of memory, and what a training step keeps for backward."""

import resource
import sys
from pathlib import Path

import torch
from torch import nn

import medpeft
from medpeft.reports.costs import costs

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def forget_peak(device: torch.device) -> None:
    """Begin a new peak of memory, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux: 5 sets the peak of the resident set back to what is resident now (proc_pid_clear_refs, man 5).
    try:
        _RESET.write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Give the peak in bytes, and what was measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA allocations"
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024, "resident set of the process"
    except (OSError, StopIteration):
        # In KiB, but in bytes on macOS; of the whole life of the process.
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident set of the process"


def bytes_kept_for_backward(model: nn.Module, batch: int, shape: tuple[int, ...]) -> int | None:
    """Count the bytes that one training step keeps for backward, None where the model cannot tell.

    Args:
        model: after `medpeft.apply`.
        batch: images of a step.
        shape: of one, in pixels.
    """
    try:
        return costs(model, torch.empty(batch, 3, *shape)).saved_bytes
    except medpeft.MedpeftError:
        return None
