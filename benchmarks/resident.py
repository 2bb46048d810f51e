"""Memory that this process holds: now, and at its peak."""

import ctypes
import gc
import resource
from pathlib import Path


def give_back() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Count the bytes that the process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def forget_peak() -> None:
    """Let the peak count from here."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Count the most bytes that it held since the counter was set back."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell the peak of a process")
