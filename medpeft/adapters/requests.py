"""Requests of `apply`: a call such as `"bias+norm"` or `{"lora": {"rank": 8}}`, taken apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from ..errors import MedpeftError, clipped, did_you_mean, require
from .registry import Method, find

# fmt: off
Name = Literal[
    "full", "linear_probe", "bn", "ln", "norm", "attention", "bias", "bitfit", "adaptformer", "houlsby",
    "pfeiffer", "adapter_plus", "conv_adapter", "convpass", "difffit", "dtl", "fact", "ia3", "loha", "lokr",
    "lora", "lst", "miss", "mona", "oft", "prefix", "repadapter", "tsa", "residual_adapter", "shira", "ssf",
    "svdiff", "vera", "vpt_deep", "vpt_shallow",
]
# fmt: on
"""The methods of this package, so that an editor completes them; others may be registered."""

Methods = Name | str | Mapping[str, Mapping[str, Any] | None]

_OF_APPLY = ("target", "exclude", "depth", "head", "batchnorm", "keep_base", "dtype", "seed", "data")
"""Keywords of `apply` that are no options of a method."""

_OTHER_NAMES = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_bias": "bias",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
    "target_modules": "target",
    "exclude_modules": "exclude",
    "modules_to_save": "head",
}
"""What other libraries call an option."""


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
        MedpeftError: an unknown method, an unknown or ambiguous option, a value that an option cannot have,
            or nothing requested.
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


def options_by_method(requested: Methods) -> dict[str, dict[str, Any]]:
    """Read `"lora+bias"` or `{"lora": {"rank": 8}, "bias": {}}`: the options of every method by its name.

    Raises:
        MedpeftError: it is neither text nor a mapping of that form.
    """
    if isinstance(requested, str):
        return {part.strip(): {} for part in requested.split("+")}
    if not isinstance(requested, Mapping) or not requested:
        raise MedpeftError(
            f"{clipped(requested)} names no method: give a name such as 'lora', a union such as 'bias+norm', "
            "or a dict of options by name."
        )
    options_by_name = {}
    for name, options in requested.items():
        require(isinstance(name, str), f"{clipped(name)} names no method: the keys of the dict are names.")
        if options is not None and not _is_by_name(options):
            find(name)
            raise MedpeftError(
                f"The options of {name!r} must be a dict, such as {_example(name)}, "
                f"and are {clipped(options)}."
            )
        options_by_name[name] = dict(options or {})
    return options_by_name


def _is_by_name(options: object) -> bool:
    """Whether something is a mapping whose keys are text."""
    return isinstance(options, Mapping) and all(isinstance(key, str) for key in options)


def _example(name: str) -> dict[str, dict[str, Any]]:
    """Write how a method is given one of its options."""
    first = list(find(name).options.items())[:1]
    return {name: dict(first)}


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
    method.require_options(options)
    return Request(method, options, places)


def _unknown_option(option: str, asked: list[Method]) -> MedpeftError:
    """Say which options the methods have, and which was probably meant."""
    names = list(_OF_APPLY)
    offers = []
    for method in asked:
        names += method.options
        offers.append(f"{method.name!r} takes {', '.join(method.options) or 'none'}")
    hint = did_you_mean(option, names)
    if _OTHER_NAMES.get(option) in names:
        hint = f" Did you mean {_OTHER_NAMES[option]!r}?"
    return MedpeftError(f"Unknown option {option!r}.{hint} Options: {'; '.join(offers)}.")


def search_space(method: Methods) -> dict[str, tuple[Any, ...]]:
    """List the values worth trying for the options of one or more methods.

    Args:
        method: `"lora"`, `"lora+ssf"`, or `{"lora": {"rank": 8}, "ssf": {}}`. Options that have a value here
            are left out.

    Returns:
        The values by "method.option", for instance `{"lora.rank": (2, 4, 8, 16, 32), …}`.

    Raises:
        MedpeftError: an unknown method.

    Examples:
        >>> import medpeft
        >>> medpeft.search_space({"lora": {"dora": False}})
        {'lora.rank': (2, 4, 8, 16, 32)}
    """
    space: dict[str, tuple[Any, ...]] = {}
    for name, options in options_by_method(method).items():
        for option, values in find(name).search.items():
            if option not in options:
                space[f"{name}.{option}"] = values
    return space
