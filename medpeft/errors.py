"""Errors of medpeft, and how their messages list names.

ValueError
└── MedpeftError         a call that cannot be carried out
    └── CheckpointError  a file that cannot be written, read, or fitted to the model
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class MedpeftError(ValueError):
    """A call that cannot be carried out; the message names the thing and the next step.

    Examples:
        >>> import medpeft, torch
        >>> try:
        ...     medpeft.remove(torch.nn.Linear(4, 4))
        ... except medpeft.MedpeftError as error:
        ...     print(error)
        This Linear is not adapted: call medpeft.apply(model, method) first.
    """


class CheckpointError(MedpeftError):
    """A file that cannot be written, read, or fitted to the model.

    Examples:
        >>> import medpeft
        >>> try:
        ...     medpeft.inspect(b"no checkpoint")
        ... except medpeft.CheckpointError as error:
        ...     print(error)
        the file given as 13 bytes is no safetensors file, or was cut off: it has 13 bytes.
    """


def require(condition: bool, message: str) -> None:
    """Raise `MedpeftError(message)` unless `condition` holds."""
    if not condition:
        raise MedpeftError(message)


def clipped(value: object) -> str:
    """Show a value by the beginning of its `repr`, on one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a `__repr__` of the user's own
        text = f"<{type(value).__name__}>"
    if len(text) > 80:
        return text[:80] + "…"
    return text


def listed(names: Iterable[object], *, most: int = 5) -> str:
    """Write names as a message shows them: `'a', 'b' and 3 more`."""
    every = list(names)
    shown = ", ".join(map(repr, every[:most]))
    if len(every) > most:
        return f"{shown} and {len(every) - most} more"
    return shown


def did_you_mean(name: str, choices: Collection[str]) -> str:
    """Write the sentence ` Did you mean 'lora'?`, with a space before it; empty if no choice is near."""
    nearest = difflib.get_close_matches(name, choices, n=1)
    if not nearest:
        return ""
    return f" Did you mean {nearest[0]!r}?"
