"""Forwards that are running: who switches a model's adapters on or off waits for them, and they wait for the switch.

Without that, a forward in another thread would meet half of its layers adapted and half not.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import MedpeftError


class Token:
    """One running forward. It is held by that forward alone, so that even an interrupted one leaves nothing counted."""

    __slots__ = ("__weakref__",)


_changed = threading.Condition(threading.RLock())
# By model and token, the thread that runs the forward.
_running: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Token, int]] = WeakKeyDictionary()


def _after_fork() -> None:
    """Forget the forwards of threads that a child process does not have, and a lock that one of them may have held."""
    global _changed
    _changed = threading.Condition(threading.RLock())
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def begin(model: nn.Module, token: Token) -> None:
    """Count a forward of a model as running, as soon as nobody switches the model."""
    with _changed:
        if model not in _running:
            _running[model] = WeakKeyDictionary()
        _running[model][token] = threading.get_ident()


def end(model: nn.Module, token: Token) -> None:
    """Count it no longer."""
    with _changed:
        tokens = _running.get(model)
        if tokens is not None:
            tokens.pop(token, None)
        _changed.notify_all()


@contextmanager
def switching(model: nn.Module, action: str) -> Iterator[None]:
    """Wait until no other thread runs the model, and let none begin for the duration of a `with` block.

    Raises:
        MedpeftError: a forward of this very thread is running, and so are others, which could wait for each
            other.
    """
    here = threading.get_ident()
    with _changed:
        while True:
            threads = set(_running.get(model, {}).values())
            if not threads - {here}:
                break
            if here in threads:
                raise MedpeftError(
                    f"{action} within a forward of the model, while another thread runs it, would wait for "
                    f"ever: call it before or after the forward."
                )
            _changed.wait(timeout=0.1)  # An interrupted forward vanishes without notice.
        yield
