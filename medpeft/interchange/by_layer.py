"""Options of a method that hold a file, from those that each of its layers needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..adapters.by_place import ByPlace, plain_if_one


def joined(of_layers: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Join the options of layers into those of their method: plain where all agree, else by place.

    Args:
        of_layers: By name of a layer the options that it needs; one that it leaves out may be any.
        defaults: Values of options that no layer needs.
    """
    options: dict[str, Any] = {}
    for option, default in defaults.items():
        needed = {name: own[option] for name, own in of_layers.items() if option in own}
        usual = next(iter(needed.values()), default)
        options[option] = usual
        if needed:
            options[option] = plain_if_one(ByPlace({name: needed.get(name, usual) for name in of_layers}))
    return options
