"""Options by place: `{"rank": {"blocks.*.attn.*": 16, "*": 4}}` gives layers values of their own.

- The patterns are those of `target`, and the first one that matches a layer decides.
- A layer that none matches has the option's default.
- `plan` asks the patterns once. From then on, on the model and in files, an option by place is the value of
  every layer by its name (`ByPlace`): nothing depends on patterns, their order or what a role means.
- Where all layers got the same value, the option is that value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from ..architecture.network import Network
from ..architecture.targets import Pattern, no_hit, patterns, picks
from ..errors import MedpeftError, clipped, require
from .options import fits, require_options

_MOST = 20_000
"""Entries of the longest dict: more than any model has layers to adapt."""

_MOST_CHOICES = 100
"""Most different values, taken together, of the options that choose layers."""

_LONGEST = 1_000
"""Characters of the longest pattern."""

_MOST_SHOWN = 12
"""Most different values in one line of text."""

_NOWHERE = object()


class ByPlace(dict[str, Any]):
    """Values of an option by the name of the layer, for every layer that its method adapts."""


def is_by_place(value: object, annotation: Any) -> bool:
    """Whether a value is a dict of values by place.

    A dict that the option may have as its value is none; an option without an annotation may have any.
    """
    return isinstance(value, Mapping) and not fits(value, annotation)


def require_by_place(owner: str, option: str, values: Mapping[Any, Any], annotation: Any) -> None:
    """Raise `MedpeftError` where a key is no pattern, or a value is not what the annotation says."""
    require(
        0 < len(values) <= _MOST,
        f"{owner}: {option} by place needs patterns, 1 to {_MOST:,} of them, and has {len(values):,}: write "
        f"{option}={{'blocks.*': …}}.",
    )
    for pattern, value in values.items():
        is_single = pattern is not None and not isinstance(pattern, (tuple, frozenset))
        is_short = not isinstance(pattern, str) or len(pattern) <= _LONGEST
        require(
            is_single and is_short,
            f"{owner}: {option} by place: {clipped(pattern)} is no single pattern of up to {_LONGEST:,} "
            "characters: give each pattern a value of its own.",
        )
        try:
            patterns(pattern)
        except MedpeftError as error:
            raise MedpeftError(f"{owner}: {option} by place: {error}") from None
        label = f"{option}[{clipped(pattern)}]"
        require_options(owner, {label: value}, {label: annotation})


def at(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the options of one layer."""
    of_layer = {}
    for option, value in options.items():
        if isinstance(value, ByPlace):
            value = value.get(name, _NOWHERE)
        of_layer[option] = value
    return of_layer


def choices(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the different options that layers have; one alone where no option is by place.

    Raises:
        MedpeftError: there are more than any model needs: for each of them the model is looked at once.
    """
    by_place = {option: value for option, value in options.items() if isinstance(value, ByPlace)}
    if not by_place:
        return [dict(options)]
    different: dict[str, dict[str, Any]] = {}
    for name in next(iter(by_place.values())):
        of_layer = at(options, name)
        if _NOWHERE not in of_layer.values():
            different[repr(of_layer)] = of_layer
    require(
        len(different) <= _MOST_CHOICES,
        f"{', '.join(by_place)} by place choose layers in {len(different):,} different ways: "
        f"{_MOST_CHOICES} is the limit.",
    )
    return list(different.values())


class Asked:
    """The options of a method as they were asked for, with the patterns of those that are by place.

    Attributes:
        everywhere: The options; those by place have a value for every module of the model.
    """

    def __init__(
        self, network: Network, method: str, options: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> None:
        """Ask the patterns about every module.

        Args:
            network: The model.
            method: Name of the method, for messages.
            options: Its options; a mapping that is in `defaults` is by place.
            defaults: Values of the options by place where no pattern matches; `...` for none.
        """
        self._network, self._method = network, method
        self._deciding: dict[str, dict[str, Pattern | None]] = {}
        self._patterns: dict[str, list[Pattern]] = {}
        self.everywhere = dict(options)
        for option, default in defaults.items():
            self._patterns[option] = list(options[option])
            deciding = {name: self._first(option, name) for name in network.modules}
            values = ByPlace()
            for name, pattern in deciding.items():
                values[name] = default if pattern is None else options[option][pattern]
            self._deciding[option] = deciding
            self.everywhere[option] = values

    def _first(self, option: str, name: str) -> Pattern | None:
        """Find the first pattern of an option that matches a module."""
        for pattern in self._patterns[option]:
            if picks(self._network, pattern, name):
                return pattern
        return None

    def narrowed(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the options for the layers that the method adapts; one that is the same in all is plain.

        Raises:
            MedpeftError: a pattern matches none of the layers or decides at none, or a layer has no value.
        """
        layers = list(dict.fromkeys(names))
        options = dict(self.everywhere)
        for option in self._patterns:
            self._require_deciding(option, layers)
            values = ByPlace()
            for name in layers:
                values[name] = options[option][name]
                require(
                    values[name] is not ...,
                    f"{self._method!r} has no default of {option}, and no pattern gives {name!r} one: add "
                    "'*' as the last pattern.",
                )
            options[option] = plain_if_one(values)
        return options

    def _require_deciding(self, option: str, layers: Collection[str]) -> None:
        """Raise `MedpeftError` for a pattern that decides nowhere, and say why."""
        deciding = {self._deciding[option][name] for name in layers}
        for pattern in self._patterns[option]:
            if pattern in deciding:
                continue
            if not any(picks(self._network, pattern, name) for name in layers):
                reason = no_hit(self._network, list(layers), pattern, self._method)
                raise MedpeftError(f"{self._method!r}: {option} by place: {reason}")
            raise MedpeftError(
                f"{self._method!r}: {option}[{clipped(pattern)}] decides nowhere: the first pattern that "
                "matches a layer does, and those before it match all of its layers. Put it before them."
            )


def plain_if_one(values: ByPlace) -> Any:
    """Return the one value that all layers have, or the values by place."""
    if len(_layers_by_value(values)) == 1:
        return next(iter(values.values()))
    return values


def _layers_by_value(values: ByPlace) -> dict[str, list[str]]:
    """List the layers that have each value, by the value as text."""
    layers: dict[str, list[str]] = {}
    for name, value in values.items():
        layers.setdefault(repr(value), []).append(name)
    return layers


def shown(value: object) -> str:
    """Write the value of an option; of one by place each value, with the number of its layers.

    >>> shown(ByPlace({"blocks.0.attn.qkv": 16, "blocks.0.mlp.fc1": 4, "blocks.0.mlp.fc2": 4}))
    '16 at blocks.0.attn.qkv, 4 at 2 layers (blocks.0.mlp.fc1, …)'
    """
    if not isinstance(value, ByPlace):
        return repr(value)
    texts = []
    for one, layers in _layers_by_value(value).items():
        where = layers[0]
        if len(layers) > 1:
            where = f"{len(layers)} layers ({layers[0]}, …)"
        texts.append(f"{one} at {where}")
    if len(texts) > _MOST_SHOWN:
        texts[_MOST_SHOWN:] = [f"and {len(texts) - _MOST_SHOWN:,} other values"]
    return ", ".join(texts)


def notes(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Write one line for each option by place."""
    lines = []
    for method, options in methods.items():
        for option, value in options.items():
            if isinstance(value, ByPlace):
                lines.append(f"{method}: {option} {shown(value)}")
    return lines
