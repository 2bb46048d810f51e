"""Selecting layers: where a method can go, and what `target` and `exclude` keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from ..errors import MedpeftError
from .network import ROLES, Network

Predicate = Callable[[str, nn.Module], bool]


Pattern = str | re.Pattern[str] | type[nn.Module] | Predicate


Target = Pattern | Sequence[Pattern] | None


def picks(network: Network, pattern: Pattern, name: str) -> bool:
    """Whether one pattern of a target picks a module.

    A pattern is a role, a glob of the module's name or of the name of a module around it, a compiled regular expression, a
    layer type, or a predicate `(name, layer) -> bool`.
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
    return bool(pattern(name, module))


def patterns(target: Target) -> list[Pattern]:
    """A target as a list of patterns."""
    if target is None:
        return []
    if isinstance(target, (str, re.Pattern, type)) or callable(target):
        return [target]
    found = list(target)
    for pattern in found:
        if not (isinstance(pattern, (str, re.Pattern, type)) or callable(pattern)):
            raise MedpeftError(
                f"target {pattern!r} is no pattern: give a glob such as 'blocks.*', a role ({', '.join(ROLES)}), a "
                "compiled regular expression, a layer type, or a predicate (name, layer) -> bool."
            )
    return found


def choose(network: Network, names: Sequence[str], target: Target, exclude: Target, method: str) -> set[str]:
    """Those of `names` that the target picks and the exclusion does not.

    Raises:
        MedpeftError: a pattern picks none of them; the message shows which names there are.
    """
    wanted = patterns(target)
    for pattern in (*wanted, *patterns(exclude)):
        if not any(picks(network, pattern, name) for name in names):
            raise MedpeftError(_no_hit(network, names, pattern, method))
    chosen = (n for n in names if not wanted or any(picks(network, p, n) for p in wanted))
    return {n for n in chosen if not any(picks(network, p, n) for p in patterns(exclude))}


def _no_hit(network: Network, names: Sequence[str], pattern: Pattern, method: str) -> str:
    head = [n for n in network.modules if network.inside(n, network.head) and picks(network, pattern, n)]
    if head:
        why = f"it names the head {head[0]!r}, which is trained whole: pass head=None to adapt it instead."
    else:
        shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
        number = "1 layer" if len(names) == 1 else f"{len(names)} layers"
        why = f"{method!r} fits {number} here: {shown}." if names else f"{method!r} fits no layer here."
    return f"The pattern {pattern!r} picks no layer that {method!r} fits in {type(network.model).__name__}: {why}"
