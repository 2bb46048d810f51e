"""What medpeft raises: one error for models and methods, one below it for files."""

from __future__ import annotations


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
