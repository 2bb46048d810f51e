"""The methods by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..errors import MedpeftError, did_you_mean, require
from .adapter import Adapter

Selector = Callable[..., bool]
Methods = str | Mapping[str, Mapping[str, Any] | None]
Registered = TypeVar("Registered", bound=type[Adapter] | Selector)


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: The name it is called by.
        define: A subclass of `Adapter` for an additive method, a function `(name, parameter, layer) -> bool`
            for a selective one.
        options: Every option with its default; `...` for an option without one.
        site_options: Names of the options that choose the sites of an additive method.
        adapter_options: Names of the options of its adapter, or of the predicate.
        hint: Sentence for the error if the method fits nothing.
        search: Values worth trying, per option.
        selects: Predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on its matrices.
        identity: Whether the adapted model computes at first the same as the base.
        unmergeable: Reason why no weight ever computes the same, "" for a method that may be merged.
    """

    name: str
    define: type[Adapter] | Selector
    options: Mapping[str, Any]
    site_options: frozenset[str]
    adapter_options: frozenset[str]
    hint: str = ""
    search: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    selects: Selector | None = None
    fast: tuple[str, ...] = ()
    decays: bool = True
    identity: bool = True
    unmergeable: str = ""

    def __post_init__(self) -> None:
        stray = [option for option in self.search if option not in self.options]
        if stray:
            raise MedpeftError(
                f"{self.define.__name__} would search {', '.join(stray)}, which is none of its options."
            )

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

    def options_of_adapter(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options of the adapter, or of the predicate."""
        return {name: value for name, value in options.items() if name in self.adapter_options}


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
    """Register a class derived from `Adapter`, or a predicate over parameters, as a method.

    A predicate takes a parameter's full name, the parameter, the `medpeft.architecture.network.Layer` that
    owns it, and its options as keywords. A parameter for which it returns True becomes trainable.

    Args:
        name: The name for `apply`; letters, digits and underscores.
        hint: Sentence for the error if the method fits nothing: "it adapts …; try …".
        search: Values worth trying, per option, for `medpeft.search_space`.
        selects: A predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on the method's matrices; vectors and scalars are never
            decayed.
        identity: Whether the adapted model computes at first the same as the base.
        unmergeable: Reason why no weight ever computes the same, for the error of `merge`.

    Raises:
        MedpeftError: the name is taken or no identifier, or the object is no method or does nothing.

    Examples:
        >>> import medpeft
        >>> @medpeft.register("first_layer")
        ... def first_layer(name, parameter, layer):
        ...     "Everything in the module called `0`."
        ...     return name.startswith("0.")
        >>> medpeft.methods()["first_layer"]
        'Everything in the module called `0`.'
    """
    require(name.isidentifier(), f"{name!r} cannot name a method: use letters, digits and underscores.")

    def add(define: Registered) -> Registered:
        taken = f"A method called {name!r} is registered already: choose another name."
        require(name not in _METHODS, taken)
        site_options, adapter_options = _options_of(define)
        _METHODS[name] = Method(
            name, define, {**site_options, **adapter_options}, frozenset(site_options),
            frozenset(adapter_options), hint, search or {}, selects, fast, decays, identity, unmergeable,
        )  # fmt: skip
        return define

    return add


def _options_of(define: type[Adapter] | Selector) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the options of a method from its signatures: those that choose its sites, and all others.

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
    """Raise if a class overrides none of the faces of an adapter."""
    for face in ("enter", "forward", "merged"):
        if getattr(adapter, face) is not getattr(Adapter, face):
            return
    raise MedpeftError(
        f"{adapter.__name__} does nothing: define forward(x, y), enter(x, others) or merged(weight, bias)."
    )


def _keyword_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Map the keyword-only parameters of a function to their defaults, `...` for one without."""
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


def options_by_method(requested: Methods) -> dict[str, dict[str, Any]]:
    """Read `"lora+bias"` or `{"lora": {"rank": 8}, "bias": {}}`: the options of every method by its name."""
    if isinstance(requested, str):
        return {part.strip(): {} for part in requested.split("+")}
    if isinstance(requested, Mapping) and requested:
        return {name: dict(options or {}) for name, options in requested.items()}
    raise MedpeftError(
        f"{requested!r} names no method: give a name such as 'lora', a union such as 'bias+norm', or a dict "
        "of options by name."
    )
