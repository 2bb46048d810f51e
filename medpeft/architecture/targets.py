"""Selecting layers: what `target` and `exclude` keep of the layers that a method fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import nn

from ..errors import MedpeftError, clipped, did_you_mean
from .network import Network

Role = Literal["attention", "mlp", "linear", "conv", "norm", "embedding"]
ROLES: tuple[Role, ...] = get_args(Role)

Predicate = Callable[[str, nn.Module], bool]

Pattern = Role | str | re.Pattern[str] | type[nn.Module] | Predicate

Target = Pattern | Sequence[Pattern] | None


def picks(network: Network, pattern: Pattern, name: str) -> bool:
    """Whether one pattern of a target picks a module.

    A pattern is a role, a glob of the module's name or of the name of a module around it, a compiled regular
    expression, a layer type, or a predicate `(name, layer) -> bool`.
    """
    module = network.modules[name]
    if isinstance(pattern, str) and pattern in ROLES:
        return network.has_role(name, pattern)
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern) or fnmatchcase(name, pattern + ".*")
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    try:
        return bool(pattern(name, module))
    except TypeError as error:
        raise MedpeftError(f"target {clipped(pattern)} cannot be asked (name, layer): {error}") from error


def patterns(target: Target) -> list[Pattern]:
    """List the patterns of a target.

    >>> patterns("blocks.*"), patterns(None)
    (['blocks.*'], [])

    Raises:
        MedpeftError: something in it is no pattern.
    """
    if target is None:
        return []
    several: list[Pattern] = [target]  # type: ignore[list-item]  # what is none is refused below
    if isinstance(target, (list, tuple, set, frozenset)):
        several = list(target)
    for pattern in several:
        if not _is_pattern(pattern):
            raise MedpeftError(
                f"target {clipped(pattern)} is no pattern: give a glob such as 'blocks.*', "
                f"a role ({', '.join(ROLES)}), a compiled regular expression, a layer type, "
                "or a predicate (name, layer) -> bool."
            )
    return several


def _is_pattern(value: object) -> bool:
    if isinstance(value, nn.Module):  # It can be called, but its name or its type is meant.
        return False
    return isinstance(value, (str, re.Pattern, type)) or callable(value)


@dataclass(frozen=True)
class Selection:
    """A target and an exclusion, as one value.

    It selects what any pattern of `target` picks, or everything without one, and no pattern of `exclude`.

    >>> Selection.of("attention", "blocks.0.*")
    Selection(target=('attention',), exclude=('blocks.0.*',))
    """

    target: tuple[Pattern, ...] = ()
    exclude: tuple[Pattern, ...] = ()

    @classmethod
    def of(cls, target: Target, exclude: Target = None) -> Selection:
        """Make a selection from the arguments of `medpeft.apply`."""
        return cls(tuple(patterns(target)), tuple(patterns(exclude)))

    def picks(self, network: Network, name: str) -> bool:
        """Whether a module is selected."""
        if self.target and not _any_picks(network, self.target, name):
            return False
        return not _any_picks(network, self.exclude, name)


def _any_picks(network: Network, patterns: Iterable[Pattern], name: str) -> bool:
    return any(picks(network, pattern, name) for pattern in patterns)


def choose(network: Network, names: Sequence[str], target: Target, exclude: Target, method: str) -> set[str]:
    """Choose those of `names` that the target picks and the exclusion does not.

    Raises:
        MedpeftError: a pattern picks none of them; the message shows which names there are.
    """
    if target is not None and not patterns(target):
        raise MedpeftError(
            f"target={target!r} picks no layer: leave it out for those that {method!r} adapts."
        )
    selection = Selection.of(target, exclude)
    for pattern in (*selection.target, *selection.exclude):
        if not any(picks(network, pattern, name) for name in names):
            raise MedpeftError(no_hit(network, names, pattern, method))
    return {name for name in names if selection.picks(network, name)}


def no_hit(network: Network, names: Sequence[str], pattern: Pattern, method: str) -> str:
    """Say that a pattern picks none of `names`, and why."""
    model = type(network.model).__name__
    fault = f"The pattern {pattern!r} picks no layer that {method!r} fits in {model}"
    for name in network.modules:
        if network.in_head(name) and picks(network, pattern, name):
            instead = "which is trained whole: pass head=None to adapt it instead"
            return f"{fault}: it names the head {name!r}, {instead}."
    if not names:
        return f"{fault}: {method!r} fits no layer here."
    number = "1 layer" if len(names) == 1 else f"{len(names)} layers"
    shown = [*names[:6], "…"] if len(names) > 6 else names
    return f"{fault}: {method!r} fits {number} here: {', '.join(shown)}.{_meant(network, names, pattern)}"


def _meant(network: Network, names: Sequence[str], pattern: Pattern) -> str:
    """Write which role, or which glob, was probably meant by a pattern that picks none of `names`."""
    if not isinstance(pattern, str):
        return ""
    role = did_you_mean(pattern.lower(), ROLES)
    glob = f"*.{pattern}"
    if not role and any(picks(network, glob, name) for name in names):
        return f" Did you mean {glob!r}?"
    return role
