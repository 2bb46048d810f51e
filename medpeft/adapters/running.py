"""Running forwards: a switch of a model's adapters waits for their end, and new ones wait for the switch.

Otherwise a forward in another thread could find half of its layers adapted and half not.
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
    """One running forward. Only the forward holds it, so it is not counted any more after an interrupt."""

    __slots__ = ("__weakref__",)


_changed = threading.Condition(threading.RLock())
# Thread of every running forward, by model and token.
_running: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Token, int]] = WeakKeyDictionary()


def _after_fork() -> None:
    """Forget running forwards, and a lock that may be held: a forked process has no other threads."""
    global _changed
    _changed = threading.Condition(threading.RLock())
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def begin(model: nn.Module, token: Token) -> None:
    """Wait until nobody switches the model, then count a forward of it as running."""
    with _changed:
        if model not in _running:
            _running[model] = WeakKeyDictionary()
        _running[model][token] = threading.get_ident()


def end(model: nn.Module, token: Token) -> None:
    """Stop counting a forward as running."""
    with _changed:
        tokens = _running.get(model)
        if tokens is not None:
            tokens.pop(token, None)
        _changed.notify_all()


@contextmanager
def switching(model: nn.Module, action: str) -> Iterator[None]:
    """Wait until no other thread runs the model, and let none begin for the duration of a `with` block.

    Raises:
        MedpeftError: this thread is inside a forward of the model, and so is another one: they could wait
            for each other for ever.
    """
    this_thread = threading.get_ident()
    with _changed:
        while True:
            threads = set(_running.get(model, {}).values())
            if not threads - {this_thread}:
                break
            if this_thread in threads:
                raise MedpeftError(
                    f"{action} within a forward of the model, while another thread runs it, would wait for "
                    f"ever: call it before or after the forward."
                )
            _changed.wait(timeout=0.1)  # An interrupted forward vanishes without notice.
        yield
