"""What an option of a method may be, read off the annotations of the method's signature.

- `int`, `float`, `bool`, `str`, `None` and unions of them are checked by type; a float is finite.
- `Literal` lists the choices.
- `Annotated[int, Must(...)]` adds a requirement; the common ones have names here.

Any other annotation, or none, leaves the value to the method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import torch

from ..errors import MedpeftError, clipped

_LARGEST_COUNT = 2**24
"""No layer is as wide; torch fails on sizes far above."""

_LARGEST_FLOAT = torch.finfo(torch.float32).max

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What adapters can be made of, and a file can hold."""


class Must(NamedTuple):
    """A requirement on a value beyond its type.

    Attributes:
        words: What the value must do, as a message says it after "must": "be above 0".
        holds: Whether a value does.
    """

    words: str
    holds: Callable[[Any], bool]


Count = Annotated[
    int, Must(f"be a whole number above 0 (up to {_LARGEST_COUNT:,})", lambda n: 0 < n <= _LARGEST_COUNT)
]
Probability = Annotated[float, Must("be at least 0 and below 1", lambda p: 0 <= p < 1)]
Share = Annotated[float, Must("be a number above 0 and at most 1", lambda share: 0 < share <= 1)]
Factor = Annotated[float, Must("be a finite number other than 0", lambda x: x != 0)]
Parts = Annotated[str, Must("be letters of 'qkvo'", lambda parts: bool(parts) and set(parts) <= set("qkvo"))]

_WORDS = {
    int: "be a whole number",
    float: "be a finite number",
    bool: "be True or False",
    str: "be text",
    NoneType: "be None",
}


def annotations_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Map the keyword-only parameters of a function to their annotations; `Any` stands for none.

    Names that exist for a type checker alone cannot be looked up, and leave the whole function unchecked.
    """
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, AttributeError, TypeError):
        signature = inspect.signature(function)
    annotations: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            annotations[parameter.name] = parameter.annotation
    return annotations


_COMMON = {"depth": Share, "keep_base": bool | None, "seed": int}


def require_common(*, depth: object, keep_base: object, dtype: object, seed: object) -> None:
    """Raise `MedpeftError` where an argument that `apply` takes for every method is none that it may be."""
    require_options("", {"depth": depth, "keep_base": keep_base, "seed": seed}, _COMMON)
    if dtype is None or dtype in DTYPES:
        return
    names = [str(choice) for choice in DTYPES]
    if isinstance(dtype, str) and f"torch.{dtype}" in names:
        raise MedpeftError(f"dtype={dtype!r} is text: write dtype=torch.{dtype}.")
    raise MedpeftError(f"dtype={clipped(dtype)} must be one of {', '.join(names)}, or None.")


def require_options(owner: str, values: Mapping[str, Any], annotations: Mapping[str, Any]) -> None:
    """Raise where a value is not what the annotation of its option says.

    >>> require_options("'lora'", {"rank": 0}, {"rank": Count})
    Traceback (most recent call last):
    medpeft.errors.MedpeftError: 'lora': rank=0 must be a whole number above 0 (up to 16,777,216).

    Args:
        owner: Whose options they are, as the message shows it; "" for the options of `apply` itself.
        values: The options.
        annotations: Annotations by option; an option without one is not checked.

    Raises:
        MedpeftError: the message names the owner, the option, the value and what it must be.
    """
    for option, value in values.items():
        annotation = annotations.get(option, Any)
        if fits(value, annotation):
            continue
        fault = f"{option}={clipped(value)} {_demand(annotation)}."
        if owner:
            fault = f"{owner}: {fault}"
        raise MedpeftError(fault)


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is what an annotation says; any value fits an unknown annotation."""
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *requirements = get_args(annotation)
        return fits(value, kind) and all(must.holds(value) for must in requirements if type(must) is Must)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(annotation))
    if origin in (Union, UnionType):
        return any(fits(value, alternative) for alternative in get_args(annotation))
    if annotation is float:
        return _is_number(value) and abs(value) <= _LARGEST_FLOAT
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None:
        return value is None
    return annotation not in _WORDS or isinstance(value, annotation)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _demand(annotation: Any) -> str:
    """Say what a value must be: "must be a finite number or be None"."""
    if get_origin(annotation) is Literal:
        return f"is not known: choose one of {', '.join(map(repr, get_args(annotation)))}"
    return f"must {' or '.join(_words(annotation))}"


def _words(annotation: Any) -> list[str]:
    """List what a value may be, one item for each alternative."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return [must.words for must in get_args(annotation)[1:] if type(must) is Must]
    if origin is Literal:
        return [f"be {choice!r}" for choice in get_args(annotation)]
    if origin in (Union, UnionType):
        words = []
        for alternative in get_args(annotation):
            words += _words(alternative)
        return words
    return [_WORDS[NoneType if annotation is None else annotation]]
