"""Running forwards: a switch of a model's adapters waits for their end, and new ones wait for the switch.

Otherwise a forward in another thread could find half of its layers adapted and half not.

Forwards and switches of a model stand in one queue, each as a token. No lock is held: an interrupt can come
at any line, also where a lock would be given back, and whoever waits for it would wait for ever. A token is
held by its call alone, so it leaves the queue also if the call ends without a word.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import MedpeftError

_PAUSE = 0.0005
"""Seconds between two looks at the queue."""


class Token:
    """A running forward, a switch, or an open block, and its thread.

    Attributes:
        is_switch: Whether it is a switch.
        strength: Of a block, the strength at which the methods act inside; None where they are merged.
        thread: Its thread.
    """

    __slots__ = ("__weakref__", "is_switch", "strength", "thread")

    def __init__(self, *, is_switch: bool = False, strength: float | None = None) -> None:
        self.is_switch, self.strength, self.thread = is_switch, strength, threading.get_ident()


class Tokens:
    """The tokens of every model, in the order in which they came."""

    def __init__(self) -> None:
        self._by_model: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Token, None]] = WeakKeyDictionary()

    def add(self, model: nn.Module, token: Token) -> None:
        """Add a token as the last one."""
        self._by_model.setdefault(model, WeakKeyDictionary())[token] = None

    def discard(self, model: nn.Module, token: Token) -> None:
        """Take a token out, if it is there."""
        tokens = self._by_model.get(model)
        if tokens is not None:
            tokens.pop(token, None)

    def of(self, model: nn.Module) -> list[Token]:
        """List the tokens of a model."""
        tokens: list[Token] = []
        by_token = self._by_model.get(model)
        if by_token is None:
            return tokens
        for reference in by_token.keyrefs():
            token = reference()
            if token is not None:
                tokens.append(token)
        return tokens

    def keep_those_of_this_thread(self) -> None:
        """Forget all others: a forked process has no other threads."""
        for model in list(self._by_model):
            for token in self.of(model):
                if token.thread != threading.get_ident():
                    self.discard(model, token)


_queue = Tokens()
_blocks = Tokens()


def _after_fork() -> None:
    _queue.keep_those_of_this_thread()
    _blocks.keep_those_of_this_thread()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def begin(model: nn.Module, token: Token) -> bool:
    """Wait until nobody switches the model, then count a forward of it as running.

    A forward within a forward, or within a switch, does not wait.

    Returns:
        Whether it is within neither.
    """
    _queue.add(model, token)
    while True:
        earlier = _earlier(model, token)
        if any(other.thread == token.thread for other in earlier):
            return False
        if not any(map(_is_switch, earlier)):
            return True
        time.sleep(_PAUSE)


def end(model: nn.Module, token: Token) -> None:
    """Stop counting a forward as running."""
    _queue.discard(model, token)


@contextmanager
def counted(model: nn.Module) -> Iterator[None]:
    """Count a forward of the model as running, after any switch, for the duration of a `with` block."""
    token = Token()
    try:
        begin(model, token)
        yield
    finally:
        end(model, token)


@contextmanager
def switching(model: nn.Module, action: str) -> Iterator[None]:
    """Wait until no other thread runs the model, and let none begin for the duration of a `with` block.

    Raises:
        MedpeftError: this thread is inside a forward of the model, and so is another one: they could wait
            for each other for ever.
    """
    token = Token(is_switch=True)
    try:
        try:
            _queue.add(model, token)
            _await_turn(model, token, action)
            yield
        finally:
            _queue.discard(model, token)
    finally:
        _queue.discard(model, token)  # If an interrupt came before the first.


def _await_turn(model: nn.Module, token: Token, action: str) -> None:
    """Wait until a switch is the first in the queue, but for what its own thread has there."""
    while True:
        earlier = _earlier(model, token)
        own = [other for other in earlier if other.thread == token.thread]
        others = len(own) < len(earlier)
        if not others or any(map(_is_switch, own)):
            return
        if own:
            raise MedpeftError(
                f"{action} within a forward of the model, while another thread runs it, would wait for "
                f"ever: call it before or after the forward."
            )
        time.sleep(_PAUSE)


def _earlier(model: nn.Module, token: Token) -> list[Token]:
    """List the tokens that came before one."""
    tokens = _queue.of(model)
    return tokens[: tokens.index(token)]


def _is_switch(token: Token) -> bool:
    return token.is_switch


def open_block(model: nn.Module, token: Token) -> None:
    """Count a block as open that needs other values in the place of the trained ones."""
    _blocks.add(model, token)


def close_block(model: nn.Module, token: Token) -> None:
    """Stop counting a block as open."""
    _blocks.discard(model, token)


def has_open_block(model: nn.Module) -> bool:
    """Whether any block is open."""
    return bool(_blocks.of(model))


def innermost_strength(model: nn.Module) -> float | None:
    """Return the strength of the block that was opened last, None where none is open or it has none."""
    blocks = _blocks.of(model)
    if not blocks:
        return None
    return blocks[-1].strength


def strengths_elsewhere(model: nn.Module) -> list[float]:
    """List the strengths of the blocks that other threads have open."""
    others = [block for block in _blocks.of(model) if block.thread != threading.get_ident()]
    return [block.strength for block in others if block.strength is not None]
