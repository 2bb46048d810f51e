"""The options of a method in all their variants, read from the registry, so that a new method needs no list."""

import ast
import re
from functools import cache
from itertools import combinations

import torch
from tiny_places import PLACES, apply_at, build

import medpeft
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
# Words by which a method starts apart from the base, on purpose.
OFFICIAL = ("official", "eye")


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
    others = find(method).search.get(option, ())
    if isinstance(default, str):
        others = _words(method, option)
    return default, *(value for value in others if isinstance(value, str) and value != default)


def _words(method: str, option: str) -> tuple:
    """The words that an option takes, by the error that another one gets."""
    for place in PLACES:
        try:
            apply_at(place, build(place, torch.float32), method, **{option: "?"})
        except medpeft.MedpeftError as error:
            named = re.search(rf"{option}='\?' .*: choose one of (.+)\.$", str(error))
            if named is not None:
                return ast.literal_eval(f"({named[1]},)")
    raise AssertionError(f"{method}: no error names the words of {option}; add its values to OTHERS")


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
        if first != second:
            found.append({**options, first: value, second: other})
    return found


def starts_as_base(method: str, options: dict) -> bool:
    """Whether a method promises to change nothing at first."""
    return find(method).identity and not any(value in OFFICIAL for value in options.values())
