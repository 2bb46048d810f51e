"""A value that one place of an adapter, or one adapter of a method, leaves for the next."""

from __future__ import annotations

import threading
from typing import Any

import torch


class Handover:
    """A value that one place of an adapter leaves for the other, within one forward of the layer.

    The adapters of a method may hand a value on from one to the next as well, within one forward of a module
    around them. Every thread has its own. A layer that calls itself has one for each call. Copies and files
    start empty.
    """

    def __init__(self) -> None:
        self._frames: dict[int, list[list[Any]]] = {}

    def open(self) -> None:
        """Begin a forward of the layer."""
        self._frames.setdefault(_thread(), []).append([])

    def close(self) -> None:
        """End the forward, and forget its value."""
        frames = self._frames.get(_thread())
        if frames:
            frames.pop()
        if not frames:
            self._frames.pop(_thread(), None)

    def leave(self, value: Any) -> None:
        """Keep a value for the other place, if a forward of the layer is running and has none yet."""
        frames = self._frames.get(_thread())
        if frames and not frames[-1]:
            frames[-1].append(value)

    def hand_on(self, value: Any) -> None:
        """Keep a value in place of the one that was left before, if a forward is running."""
        frames = self._frames.get(_thread())
        if frames:
            frames[-1][:] = [value]

    def take(self, default: Any) -> Any:
        """Return the value, or the default if none was left."""
        frames = self._frames.get(_thread())
        if frames and frames[-1]:
            return frames[-1][0]
        return default

    def take_once(self) -> Any:
        """Return the value and forget it; None if none was left."""
        frames = self._frames.get(_thread())
        if frames and frames[-1]:
            return frames[-1].pop()
        return None

    def __reduce__(self) -> tuple[type[Handover], tuple[()]]:
        return Handover, ()


def _thread() -> int:
    """Key of the running thread. A compiled forward runs in one thread only."""
    if torch.compiler.is_compiling():
        return 0
    return threading.get_ident()
