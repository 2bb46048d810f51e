"""The methods by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from ..errors import MedpeftError, clipped, did_you_mean, require
from .adapter import Adapter
from .by_place import ByPlace, is_by_place, require_by_place
from .options import annotations_of, require_options

Selector = Callable[..., bool]
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
        annotations: What each option may be, as `medpeft.adapters.options` reads it.
        hint: Sentence for the error if the method fits nothing.
        search: Values worth trying, per option.
        selects: Predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on its matrices.
        identity: Whether the adapted model computes at first the same as the base.
        unmergeable: Reason why no weight ever computes the same, "" for a method that may be merged.
        unscalable: Reason why it has no strength between 0 and 1, "" for a method that may be scaled.
        takes_complex: Whether its adapters, which are real, act rightly on layers of complex numbers.
        older: Values of options that came later, for files that lack them: those that compute as before.
        by_image: Whether `torch.vmap` runs an adapted layer with other adapter tensors for each image.
    """

    name: str
    define: type[Adapter] | Selector
    options: Mapping[str, Any]
    site_options: frozenset[str]
    adapter_options: frozenset[str]
    annotations: Mapping[str, Any]
    hint: str = ""
    search: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    selects: Selector | None = None
    fast: tuple[str, ...] = ()
    decays: bool = True
    identity: bool = True
    unmergeable: str = ""
    unscalable: str = ""
    takes_complex: bool = False
    older: Mapping[str, Any] = field(default_factory=dict)
    by_image: bool = False

    def __post_init__(self) -> None:
        for values, would in ((self.search, "search"), (self.older, "read from older files")):
            stray = [option for option in values if option not in self.options]
            require(
                not stray, f"{self.name!r} would {would} {', '.join(stray)}, which is none of its options."
            )

    @cached_property
    def summary(self) -> str:
        """The first line of the method's docstring."""
        return (inspect.getdoc(self.define) or "").partition("\n")[0]

    @property
    def adapter(self) -> type[Adapter] | None:
        """The adapter of an additive method, None for a selective one."""
        if isinstance(self.define, type):
            return self.define
        return None

    def require_options(self, options: Mapping[str, Any]) -> None:
        """Raise `MedpeftError` where the value of an option is none that it may have, in some place."""
        by_place = self.by_place(options)
        plain = {option: value for option, value in options.items() if option not in by_place}
        require_options(repr(self.name), plain, self.annotations)
        for option in by_place:
            require_by_place(repr(self.name), option, options[option], self.annotations[option])

    def by_place(self, options: Mapping[str, Any]) -> list[str]:
        """List the options that have a dict of values by place; see `by_place.py`."""
        names = []
        for option, value in options.items():
            if is_by_place(value, self.annotations.get(option, Any)):
                names.append(option)
        return names

    def read_options(self, options: Mapping[str, Any], layers: Collection[str]) -> dict[str, Any]:
        """Check options from a file, and mark those that are by place.

        Args:
            options: The options.
            layers: Names of the layers with adapters of the method.

        Raises:
            MedpeftError: an option has a value that it cannot have, or by place other layers.
        """
        self.require_options(options)
        read = dict(options)
        for option in self.by_place(options):
            read[option] = ByPlace(options[option])
            # A selective method is not asked again: the parameters that it picked are in the file.
            require(
                self.adapter is None or read[option].keys() == set(layers),
                f"{self.name!r} has values of {option!r} for other layers than those that it adapts.",
            )
        return read

    def options_of_sites(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options that choose the sites."""
        return {name: value for name, value in options.items() if name in self.site_options}

    def options_of_adapter(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pick the options of the adapter, or of the predicate."""
        return {name: value for name, value in options.items() if name in self.adapter_options}


_FLAGS = ("decays", "identity", "takes_complex", "by_image")
_ABOUT = {"hint": str, "unmergeable": str, "unscalable": str, **dict.fromkeys(_FLAGS, bool)}

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
    unscalable: str = "",
    takes_complex: bool = False,
    older: Mapping[str, Any] | None = None,
    by_image: bool = False,
) -> Callable[[Registered], Registered]:
    """Register a class derived from `Adapter`, or a predicate over parameters, as a method.

    A predicate takes a parameter's full name, the parameter, the `medpeft.architecture.network.Layer` that
    owns it, and its options as keywords. Where it returns True the parameter becomes trainable.

    Args:
        name: The name for `apply`; letters, digits and underscores.
        hint: Sentence for the error if the method fits nothing: "it adapts …; try …".
        search: Values worth trying, per option, for `medpeft.search_space`.
        selects: A predicate for existing parameters that an additive method trains too.
        fast: Parameters that LoRA+ gives a higher learning rate.
        decays: Whether weight decay makes sense on its matrices; vectors and scalars are never decayed.
        identity: Whether the adapted model computes at first the same as the base.
        unmergeable: Reason why no weight ever computes the same, for the error of `merge`.
        unscalable: Reason why it has no strength between 0 and 1, for the error of `scaled`.
        takes_complex: Whether its adapters, which are real, act rightly on layers of complex numbers.
        older: Values of later options for files that lack them, where the default computes otherwise.
        by_image: Whether `torch.vmap` runs an adapted layer with other tensors for each image (`Bank`).

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
    flags = dict(zip(_FLAGS, (decays, identity, takes_complex, by_image), strict=True))
    about: dict[str, Any] = {"hint": hint, "unmergeable": unmergeable, "unscalable": unscalable, **flags}
    _require_description(name, search, older, selects, fast, about)
    about |= {"search": search or {}, "older": older or {}, "selects": selects, "fast": fast}

    def add(define: Registered) -> Registered:
        _METHODS[name] = replace(_method(name, define), **about)
        return define

    return add


def _require_name(name: object) -> None:
    """Raise `MedpeftError` unless a name is new and can be written in a union such as "a+b"."""
    is_name = isinstance(name, str) and name.isidentifier()
    require(is_name, f"{clipped(name)} cannot name a method: use letters, digits and underscores.")
    require(name not in _METHODS, f"A method called {name!r} is registered already: choose another name.")


def _require_description(
    name: object,
    search: object,
    older: object,
    selects: object,
    fast: object,
    about: Mapping[str, object],
) -> None:
    """Raise `MedpeftError` where an argument of `register` is of another type than it says."""
    _require_name(name)
    require_options("", about, _ABOUT)
    require(selects is None or callable(selects), f"selects={clipped(selects)} must be a predicate.")
    require(
        isinstance(fast, tuple) and all(isinstance(parameter, str) for parameter in fast),
        f"fast={clipped(fast)} must be a tuple of names.",
    )
    require(
        search is None or isinstance(search, Mapping),
        f"search={clipped(search)} must be the values worth trying by option, such as {{'rank': (4, 8)}}.",
    )
    require(
        older is None or isinstance(older, Mapping),
        f"older={clipped(older)} must be values by option, such as {{'input': 'residual'}}.",
    )


def _method(name: str, define: type[Adapter] | Selector) -> Method:
    """Make a method, its options read off the signatures of its class or predicate.

    Raises:
        MedpeftError: the object is no method, or does nothing.
    """
    if isinstance(define, type) and issubclass(define, Adapter):
        _require_a_face(define)
        site_options = _keyword_options(define.sites)
        site_options.pop("targeted", None)
        adapter_options = _keyword_options(define.__init__)
        annotations = annotations_of(define.sites) | annotations_of(define.__init__)
    elif isinstance(define, type) or not callable(define):
        raise MedpeftError(
            f"{clipped(define)} is no method: register a class derived from medpeft.Adapter or a predicate."
        )
    else:
        site_options = {}
        adapter_options = _keyword_options(define)
        annotations = annotations_of(define)
    options = {**site_options, **adapter_options}
    return Method(name, define, options, frozenset(site_options), frozenset(adapter_options), annotations)


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


def find(name: str) -> Method:
    """Return the method of that name.

    Raises:
        MedpeftError: there is none; the message names the nearest.
    """
    if name in _METHODS:
        return _METHODS[name]
    raise MedpeftError(f"Unknown method {name!r}.{_nearest(name)} Available: {', '.join(_METHODS)}.")


def _nearest(name: str) -> str:
    """Write which method or union was probably meant, as `did_you_mean` does."""
    parts = re.findall(r"\w+", name)
    if len(parts) > 1 and all(part in _METHODS for part in parts):
        return f" Did you mean {'+'.join(parts)!r}?"
    return did_you_mean(name.lower(), _METHODS)
