"""Requests of `apply`: a call such as `"bias+norm"` or `{"lora": {"rank": 8}}`, taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import MedpeftError, did_you_mean
from .registry import Method, Methods, find, options_by_method


class Request(NamedTuple):
    """One method of a request.

    Attributes:
        method: The method.
        options: Its options, defaults filled in.
        places: Its own "target" and "exclude", where it has any.
    """

    method: Method
    options: dict[str, Any]
    places: dict[str, Any]


def resolve(requested: Methods, common: Mapping[str, Any]) -> list[Request]:
    """Resolve the request of `apply`: its methods, each with its options.

    Args:
        requested: `"lora"`, `"bias+norm"`, or `{"lora": {"rank": 8}, "bitfit": {}}`.
        common: Options given as keywords; each must belong to exactly one of the methods.

    Raises:
        MedpeftError: an unknown method, an unknown or ambiguous option, or nothing requested.
    """
    options_by_name = options_by_method(requested)
    methods_by_name = {name: find(name) for name in options_by_name}
    for option in common:
        _require_one_taker(option, list(methods_by_name.values()))
    requests = []
    for name, method in methods_by_name.items():
        common_options = {option: value for option, value in common.items() if option in method.options}
        requests.append(_request(method, {**options_by_name[name], **common_options}))
    return requests


def _require_one_taker(option: str, asked: list[Method]) -> None:
    """Raise unless exactly one of the methods has the option."""
    takers = [method.name for method in asked if option in method.options]
    if not takers:
        raise _unknown_option(option, asked)
    if len(takers) > 1:
        apart = ", ".join(f"{name!r}: {{{option!r}: …}}" for name in takers)
        raise MedpeftError(
            f"{option!r} is an option of {' and '.join(map(repr, takers))}: give each its own, {{{apart}}}."
        )


def _request(method: Method, requested: dict[str, Any]) -> Request:
    """Fill in a method's defaults, and take its own target and exclusion out of the options."""
    places: dict[str, Any] = {}
    for key in ("target", "exclude"):
        if key in requested and key not in method.options:
            places[key] = requested.pop(key)
    for option in requested:
        if option not in method.options:
            raise _unknown_option(option, [method])
    options = {**method.options, **requested}
    missing = [option for option, value in options.items() if value is ...]
    if missing:
        raise MedpeftError(f"{method.name!r} needs {', '.join(missing)}: it has no default.")
    return Request(method, options, places)


def _unknown_option(option: str, asked: list[Method]) -> MedpeftError:
    options: list[str] = []
    offers = []
    for method in asked:
        options += method.options
        offers.append(f"{method.name!r} takes {', '.join(method.options) or 'none'}")
    return MedpeftError(
        f"Unknown option {option!r}.{did_you_mean(option, options)} Options: {'; '.join(offers)}."
    )
