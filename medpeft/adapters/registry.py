"""The methods by name, and what a call such as `"bias+norm"` or `{"lora": {"rank": 8}}` means."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import MedpeftError
from .adapter import Adapter

Selector = Callable[..., bool]
Methods = str | Mapping[str, Mapping[str, Any] | None]
_ACTS = ("enter", "forward", "merged")
Defined = TypeVar("Defined", bound=type[Adapter] | Selector)


@dataclass(frozen=True)
class Method:
    """A registered method.

    Attributes:
        name: The name it is called by.
        define: A subclass of `Adapter` (additive), or a function `(name, parameter, layer) -> bool` (selective).
        options: Every option with its default; `...` for an option without one.
        site_options: Those of the options that choose the sites of an additive method.
        own_options: Those of the options that its adapter, or the predicate, takes.
        hint: What to try where the method fits nothing.
    """

    name: str
    define: type[Adapter] | Selector
    options: Mapping[str, Any]
    site_options: frozenset[str]
    own_options: frozenset[str]
    hint: str

    @property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.define) or "").partition("\n")[0]

    @property
    def adapter(self) -> type[Adapter] | None:
        """The adapter of an additive method, None for a selective one."""
        return self.define if isinstance(self.define, type) else None

    @property
    def search(self) -> Mapping[str, tuple[Any, ...]]:
        """Values worth trying, per option; none for a selective method."""
        return self.adapter.search if self.adapter else {}

    def sites_with(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` that choose the sites."""
        return {name: value for name, value in options.items() if name in self.site_options}

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of `options` that the adapter, or the predicate, takes."""
        return {name: value for name, value in options.items() if name in self.own_options}


_METHODS: dict[str, Method] = {}


def register(name: str, *, hint: str = "") -> Callable[[Defined], Defined]:
    """Decorator that makes a class derived from `Adapter`, or a predicate over parameters, a method.

    Args:
        name: The name for `apply`; letters, digits and underscores.
        hint: What the error says where the method fits nothing: "it adapts …; try …".

    Raises:
        MedpeftError: the name is taken or cannot be written in `"a+b"`, or the object is neither kind or does nothing.

    A predicate takes `(name, parameter, layer)`, a parameter's full name, itself, and the `medpeft.targets.Layer` that owns
    it, and after them its options as keywords; what it returns True for becomes trainable.
    """
    if not name.isidentifier():
        raise MedpeftError(f"{name!r} cannot name a method: use letters, digits and underscores.")

    def add(define: Defined) -> Defined:
        if name in _METHODS:
            raise MedpeftError(f"A method called {name!r} is registered already: choose another name.")
        adapter: Any = define if isinstance(define, type) and issubclass(define, Adapter) else None
        if adapter is None and (isinstance(define, type) or not callable(define)):
            raise MedpeftError(f"{define!r} is no method: register a class derived from medpeft.Adapter or a predicate.")
        if adapter is not None and all(getattr(adapter, name) is getattr(Adapter, name) for name in _ACTS):
            raise MedpeftError(f"{define.__name__} does nothing: define forward(x, y), enter(x) or merged(weight, bias).")
        for_sites = _options(adapter.sites) if adapter else {}
        for_sites.pop("targeted", None)
        options = _options(adapter.__init__ if adapter else define)
        stray = [option for option in (adapter.search if adapter else {}) if option not in {**for_sites, **options}]
        if stray:
            raise MedpeftError(f"{define.__name__} would search {', '.join(stray)}, which is none of its options.")
        _METHODS[name] = Method(name, define, {**for_sites, **options}, frozenset(for_sites), frozenset(options), hint)
        return define

    return add


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    empty = inspect.Parameter.empty
    return {p.name: ... if p.default is empty else p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def methods() -> dict[str, str]:
    """Every method by name, with one line about it."""
    return {name: method.summary for name, method in _METHODS.items()}


def search_space(method: Methods) -> dict[str, tuple[Any, ...]]:
    """Values worth trying for every option of a method, as the method declares them in `Adapter.search`.

    Args:
        method: `"lora"`, `"lora+ssf"`, or `{"lora": {"rank": 8}, "ssf": {}}`; an option that is given is not searched.

    Returns:
        For instance `{"lora.rank": (2, 4, 8, 16, 32), …}`: the option's name after its method's.

    Raises:
        MedpeftError: an unknown method.
    """
    given = _as_mapping(method)
    found = [(name, option, values) for name in given for option, values in find(name).search.items()]
    return {f"{name}.{option}": values for name, option, values in found if option not in given[name]}


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        MedpeftError: there is none; the message names the nearest.
    """
    if name in _METHODS:
        return _METHODS[name]
    near = difflib.get_close_matches(name, _METHODS, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    raise MedpeftError(f"Unknown method {name!r}.{meant} Available: {', '.join(_METHODS)}.")


def resolve(requested: Methods, common: Mapping[str, Any]) -> list[tuple[Method, dict[str, Any], dict[str, Any]]]:
    """What `apply` was asked for: each method, its options with defaults filled in, and its own target and exclusion.

    Args:
        requested: `"lora"`, `"bias+norm"`, or `{"lora": {"rank": 8}, "bitfit": {}}`.
        common: Options given as keywords; each must belong to exactly one of the methods.

    Raises:
        MedpeftError: an unknown method, an unknown or ambiguous option, or nothing requested.
    """
    given = _as_mapping(requested)
    found = {name: find(name) for name in given}
    for option in common:
        takers = [name for name, method in found.items() if option in method.options]
        if not takers:
            raise _unknown_option(option, list(found.values()))
        if len(takers) > 1:
            raise MedpeftError(
                f"{option!r} is an option of {' and '.join(map(repr, takers))}: give each its own, "
                f"{{{', '.join(f'{name!r}: {{{option!r}: …}}' for name in takers)}}}."
            )
    resolved = []
    for name, method in found.items():
        own = {**given[name], **{k: v for k, v in common.items() if k in method.options}}
        where: dict[str, Any] = {key: own.pop(key) for key in ("target", "exclude") if key in own and key not in method.options}
        for option in own:
            if option not in method.options:
                raise _unknown_option(option, [method])
        missing = [k for k, default in method.options.items() if default is ... and k not in own]
        if missing:
            raise MedpeftError(f"{name!r} needs {', '.join(missing)}: it has no default.")
        resolved.append((method, {**method.options, **own}, where))
    return resolved


def _as_mapping(requested: Methods) -> dict[str, dict[str, Any]]:
    if isinstance(requested, str):
        names = [part.strip() for part in requested.split("+")]
        return {name: {} for name in names}
    if isinstance(requested, Mapping) and requested:
        return {name: dict(options or {}) for name, options in requested.items()}
    raise MedpeftError(
        f"{requested!r} names no method: give a name such as 'lora', a union such as 'bias+norm', or a dict of options by name."
    )


def _unknown_option(option: str, asked: list[Method]) -> MedpeftError:
    known = [name for method in asked for name in method.options]
    near = difflib.get_close_matches(option, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    listed = "; ".join(f"{m.name!r} takes {', '.join(m.options) or 'none'}" for m in asked)
    return MedpeftError(f"Unknown option {option!r}.{meant} Options: {listed}.")
