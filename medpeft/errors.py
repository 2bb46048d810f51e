"""What medpeft raises: one error for models and methods, one below it for files; and how its messages list names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable


class MedpeftError(ValueError):
    """A call that cannot be carried out; the message names the thing and the next step."""


class CheckpointError(MedpeftError):
    """A file that cannot be written, read, or fitted to the model."""


def require(condition: bool, message: str) -> None:
    """Raise `MedpeftError(message)` unless `condition` holds."""
    if not condition:
        raise MedpeftError(message)


def require_choice(option: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise `MedpeftError` unless `value` is one of `choices`."""
    listed = ", ".join(repr(choice) for choice in choices)
    require(value in choices, f"{option}={value!r} is not known: choose one of {listed}.")


def require_positive(option: str, value: object) -> None:
    """Raise `MedpeftError` unless `value` is a whole number above zero."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(
        whole and value > 0,  # type: ignore[operator]  # `whole` has shown that it is an int
        f"{option}={value!r} must be a whole number above 0.",
    )


def listed(names: Iterable[object], *, most: int = 5) -> str:
    """Names as a message shows them: `'a', 'b' and 3 more`."""
    every = list(names)
    shown = ", ".join(repr(name) for name in every[:most])
    if len(every) > most:
        return f"{shown} and {len(every) - most} more"
    return shown


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The sentence ` Did you mean 'lora'?`, with a space before it; empty where no known name is near."""
    nearest = difflib.get_close_matches(name, known, n=1)
    if not nearest:
        return ""
    return f" Did you mean {nearest[0]!r}?"
