"""The methods by name, and what a call such as `"bias+norm"` or `{"lora": {"rank": 8}}` means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from ..errors import MedpeftError, did_you_mean
from .adapter import Adapter

Selector = Callable[..., bool]
Methods = str | Mapping[str, Mapping[str, Any] | None]
Registered = TypeVar("Registered", bound=type[Adapter] | Selector)


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: The name it is called by.
        define: A subclass of `Adapter` (additive), or a function `(name, parameter, layer) -> bool`
            (selective).
        options: Every option with its default; `...` for an option without one.
        site_options: Options that choose the sites of an additive method.
        own_options: Options that its adapter, or the predicate, takes.
        hint: Sentence for the error where the method fits nothing.
        search: Values worth trying, per option.
        selects: Predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on its matrices.
        identity: Whether the adapted model computes at first what the base does.
        unmergeable: Reason why no weight computes what the method does, "" where one may.
    """

    name: str
    define: type[Adapter] | Selector
    options: Mapping[str, Any]
    site_options: frozenset[str]
    own_options: frozenset[str]
    hint: str = ""
    search: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    selects: Selector | None = None
    fast: tuple[str, ...] = ()
    decays: bool = True
    identity: bool = True
    unmergeable: str = ""

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.define) or "").partition("\n")[0]

    @property
    def adapter(self) -> type[Adapter] | None:
        """The adapter of an additive method, None for a selective one."""
        if isinstance(self.define, type):
            return self.define
        return None

    def options_of_sites(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options that choose the sites."""
        return {name: value for name, value in options.items() if name in self.site_options}

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options that the adapter, or the predicate, takes."""
        return {name: value for name, value in options.items() if name in self.own_options}


class Request(NamedTuple):
    """One method of what `apply` was asked for.

    Attributes:
        method: The method.
        options: Its options, defaults filled in.
        places: Its own "target" and "exclude", where it has any.
    """

    method: Method
    options: dict[str, Any]
    places: dict[str, Any]


_METHODS: dict[str, Method] = {}


def register(
    name: str,
    *,
    hint: str = "",
    search: Mapping[str, tuple[Any, ...]] | None = None,
    selects: Selector | None = None,
    fast: tuple[str, ...] = (),
    decays: bool = True,
    identity: bool = True,
    unmergeable: str = "",
) -> Callable[[Registered], Registered]:
    """Make a class derived from `Adapter`, or a predicate over parameters, a method.

    A predicate takes `(name, parameter, layer)`: a parameter's full name, itself, and the
    `medpeft.architecture.network.Layer` that owns it, and after them its options as keywords. What it returns
    True for becomes trainable.

    Args:
        name: The name for `apply`; letters, digits and underscores.
        hint: What the error says where the method fits nothing: "it adapts …; try …".
        search: Values worth trying, per option: what `medpeft.search_space` gives to a search for
            hyper-parameters.
        selects: A predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on the method's matrices; vectors and scalars are never
            decayed.
        identity: Whether the adapted model computes at first what the base does.
        unmergeable: Why no weight computes what the method does, where none ever can: what `merge` says.

    Raises:
        MedpeftError: the name is taken or cannot be written in `"a+b"`, or the object is neither kind or does
            nothing.

    Examples:
        >>> import medpeft
        >>> @medpeft.register("first_layer")
        ... def first_layer(name, parameter, layer):
        ...     "Everything in the module called `0`."
        ...     return name.startswith("0.")
        >>> medpeft.methods()["first_layer"]
        'Everything in the module called `0`.'
    """
    if not name.isidentifier():
        raise MedpeftError(f"{name!r} cannot name a method: use letters, digits and underscores.")

    def add(define: Registered) -> Registered:
        if name in _METHODS:
            raise MedpeftError(f"A method called {name!r} is registered already: choose another name.")
        site_options, own_options = _options_of(define)
        options = {**site_options, **own_options}
        stray = [option for option in search or {} if option not in options]
        if stray:
            raise MedpeftError(
                f"{define.__name__} would search {', '.join(stray)}, which is none of its options."
            )
        _METHODS[name] = Method(
            name, define, options, frozenset(site_options), frozenset(own_options), hint,
            search or {}, selects, fast, decays, identity, unmergeable,
        )  # fmt: skip
        return define

    return add


def _options_of(define: type[Adapter] | Selector) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read off a method's signatures the options that choose its sites, and those of its adapter or predicate.

    Raises:
        MedpeftError: the object is no method, or does nothing.
    """
    if isinstance(define, type) and issubclass(define, Adapter):
        _require_a_face(define)
        site_options = _keyword_options(define.sites)
        site_options.pop("targeted", None)
        return site_options, _keyword_options(define.__init__)
    if isinstance(define, type) or not callable(define):
        raise MedpeftError(
            f"{define!r} is no method: register a class derived from medpeft.Adapter or a predicate."
        )
    return {}, _keyword_options(define)


def _require_a_face(adapter: type[Adapter]) -> None:
    """Raise where a class overrides none of the faces of an adapter."""
    for face in ("enter", "forward", "merged"):
        if getattr(adapter, face) is not getattr(Adapter, face):
            return
    raise MedpeftError(
        f"{adapter.__name__} does nothing: define forward(x, y), enter(x, others) or merged(weight, bias)."
    )


def _keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Map the keyword-only parameters of a function to their defaults; `...` stands for none."""
    options: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            has_default = parameter.default is not inspect.Parameter.empty
            options[parameter.name] = parameter.default if has_default else ...
    return options


def methods() -> dict[str, str]:
    """List every method by name, with one line about it.

    Examples:
        >>> import medpeft
        >>> medpeft.methods()["bias"]
        "Every bias, norms' included; relative position tables too with tables=True (bias tuning)."
    """
    return {name: method.summary for name, method in _METHODS.items()}


def search_space(method: Methods) -> dict[str, tuple[Any, ...]]:
    """List the values worth trying for every option of a method, as it was registered with them.

    Args:
        method: `"lora"`, `"lora+ssf"`, or `{"lora": {"rank": 8}, "ssf": {}}`; an option that is given is not
            searched.

    Returns:
        For instance `{"lora.rank": (2, 4, 8, 16, 32), …}`: the option's name after its method's.

    Raises:
        MedpeftError: an unknown method.

    Examples:
        >>> import medpeft
        >>> medpeft.search_space({"lora": {"dora": False}})
        {'lora.rank': (2, 4, 8, 16, 32)}
    """
    space: dict[str, tuple[Any, ...]] = {}
    for name, options in _as_mapping(method).items():
        for option, values in find(name).search.items():
            if option not in options:
                space[f"{name}.{option}"] = values
    return space


def find(name: str) -> Method:
    """Return the method of that name.

    Raises:
        MedpeftError: there is none; the message names the nearest.
    """
    if name in _METHODS:
        return _METHODS[name]
    raise MedpeftError(
        f"Unknown method {name!r}.{did_you_mean(name, _METHODS)} Available: {', '.join(_METHODS)}."
    )


def resolve(requested: Methods, common: Mapping[str, Any]) -> list[Request]:
    """Take apart what `apply` was asked for.

    Args:
        requested: `"lora"`, `"bias+norm"`, or `{"lora": {"rank": 8}, "bitfit": {}}`.
        common: Options given as keywords; each must belong to exactly one of the methods.

    Raises:
        MedpeftError: an unknown method, an unknown or ambiguous option, or nothing requested.
    """
    options_by_name = _as_mapping(requested)
    methods_by_name = {name: find(name) for name in options_by_name}
    for option in common:
        _require_one_taker(option, list(methods_by_name.values()))
    requests = []
    for name, method in methods_by_name.items():
        own_common = {option: value for option, value in common.items() if option in method.options}
        requests.append(_request(method, {**options_by_name[name], **own_common}))
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


def _request(method: Method, own: dict[str, Any]) -> Request:
    """Fill in a method's defaults, and take its own target and exclusion out of the options."""
    places: dict[str, Any] = {}
    for key in ("target", "exclude"):
        if key in own and key not in method.options:
            places[key] = own.pop(key)
    for option in own:
        if option not in method.options:
            raise _unknown_option(option, [method])
    options = {**method.options, **own}
    missing = [option for option, value in options.items() if value is ...]
    if missing:
        raise MedpeftError(f"{method.name!r} needs {', '.join(missing)}: it has no default.")
    return Request(method, options, places)


def _as_mapping(requested: Methods) -> dict[str, dict[str, Any]]:
    if isinstance(requested, str):
        return {part.strip(): {} for part in requested.split("+")}
    if isinstance(requested, Mapping) and requested:
        return {name: dict(options or {}) for name, options in requested.items()}
    raise MedpeftError(
        f"{requested!r} names no method: give a name such as 'lora', a union such as 'bias+norm', or a dict of options by name."
    )


def _unknown_option(option: str, asked: list[Method]) -> MedpeftError:
    known: list[str] = []
    offers = []
    for method in asked:
        known += method.options
        offers.append(f"{method.name!r} takes {', '.join(method.options) or 'none'}")
    return MedpeftError(
        f"Unknown option {option!r}.{did_you_mean(option, known)} Options: {'; '.join(offers)}."
    )
