"""Does a value that a file declares have the right form? Small validators compose into larger ones."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

Validator = Callable[[Any], bool]


def text(value: Any) -> bool:
    """Accept text."""
    return isinstance(value, str)


def whole_number(value: Any) -> bool:
    """Accept a whole number; True and False are none."""
    return type(value) is int


def size(value: Any) -> bool:
    """Accept a number of elements or bytes: below 2⁴⁸, so that nothing is computed of huge numbers."""
    return whole_number(value) and 0 <= value < 2**48


def share(value: Any) -> bool:
    """Accept a share of a whole: a number above 0 and at most 1."""
    return type(value) in (int, float) and 0 < value <= 1


def one_of(*choices: str) -> Validator:
    """Accept any of the choices."""
    return lambda value: value in choices


def optional(inner: Validator) -> Validator:
    """Accept None too."""
    return lambda value: value is None or inner(value)


def list_of(inner: Validator, lengths: Container[int] | None = None) -> Validator:
    """Accept a list of such values, of any length or of one of `lengths`."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, list) or (lengths is not None and len(value) not in lengths):
            return False
        return all(map(inner, value))

    return accepts


def by_name(inner: Validator) -> Validator:
    """Accept values of one kind by name."""
    return lambda value: isinstance(value, dict) and all(map(inner, value.values()))


def fields(inner: Mapping[str, Validator]) -> Validator:
    """Accept an object with these fields; a missing one passes for None."""
    return lambda value: isinstance(value, dict) and all(inner[name](value.get(name)) for name in inner)
