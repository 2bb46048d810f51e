"""The options of a method in all their variants, read from the registry, so that a new method needs no list."""

from functools import cache
from itertools import combinations
from typing import get_args

from medpeft.adapters.registry import find

# Numbers that make an adapter small, and leave out what is random in training.
SMALL = {
    "rank": 2,
    "bottleneck": 2,
    "block_size": 4,
    "tokens": 2,
    "reduction": 2,
    "dropout": 0.0,
    "drop_path": 0.0,
}
# Values of options that are neither a yes nor a word of a closed list.
OTHERS = {"parts": ("qv", "k", "qkvo"), "alpha": (None, 5.0), "keep_outputs": (None, True, False)}
# Methods that take what the trunk computes without gradient, so that theirs with respect to the input is another.
DETACHING = ("lst", "dtl")
# Words by which a method starts apart from the base, on purpose.
OFFICIAL = ("official", "eye", "replace")
# And the start whose product is zero but for rounding.
ROUNDED = ("orthogonal",)
# Words that choose other numbers for the same formula: each is tried once, and not beside every other option.
MERE_STARTS = ("gaussian", "orthogonal", "eva")


def small(method: str) -> dict:
    """Options that make the adapters of a method small."""
    return {name: value for name, value in SMALL.items() if name in find(method).options}


@cache
def values(method: str, option: str) -> tuple:
    """All values of an option that lead to another formula, its default first; a number has its default alone."""
    default = find(method).options[option]
    if option in OTHERS:
        return OTHERS[option]
    if isinstance(default, bool):
        return default, not default
    if isinstance(default, str):
        return _words(method, option)
    others = find(method).search.get(option, ())
    return default, *(value for value in others if isinstance(value, str) and value != default)


def _words(method: str, option: str) -> tuple:
    """The words that an option takes, its default first."""
    words = get_args(find(method).annotations[option])
    assert words, f"{method}: {option} is no Literal; add its values to OTHERS"
    default = find(method).options[option]
    return default, *(word for word in words if word != default)


def variants(method: str) -> list[dict]:
    """The small options of a method, each of its other choices alone, and every two of them together."""
    options = small(method)
    choices = [
        (option, value)
        for option in find(method).options
        if option not in options
        for value in values(method, option)[1:]
    ]
    found = [options, *({**options, option: value} for option, value in choices)]
    for (first, value), (second, other) in combinations(choices, 2):
        if first != second and value not in MERE_STARTS and other not in MERE_STARTS:
            found.append({**options, first: value, second: other})
    return found


def starts_as_base(method: str, options: dict) -> bool:
    """Whether a method promises to change nothing at first."""
    return find(method).identity and not any(value in OFFICIAL + ROUNDED for value in options.values())
