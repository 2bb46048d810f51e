"""Settings as words: flags as they are typed, and the options of methods."""

import ast
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from medpeft.adapters.requests import options_by_method

from .errors import TrainerError


def flag(name: str) -> str:
    """Write a setting as it is given on the command line."""
    return "--" + name.replace("_", "-")


def options_of(method: str, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Turn `{"rank": 4}`, in a union `{"lora": {"rank": 4}}`, into the options of every method by its name.

    Raises:
        TrainerError: it is not clear whose option one is.
        medpeft.MedpeftError: no method is named.
    """
    options = options_by_method(method)
    for name, value in given.items():
        owner, dot, own = name.replace("/", ".").rpartition(".")
        by_name = isinstance(value, dict) and name in options  # Else a dict is a value by place.
        if by_name:
            owner, dot = name, "."
        if dot and owner not in options:
            raise TrainerError(f"--option {owner}.{own} is for '{owner}', and --method is {method}.")
        if not dot and len(options) > 1:
            raise TrainerError(
                f"--option {name}={value} could be for any of {', '.join(options)}. "
                f"Say for which: --option {next(iter(options))}.{name}={value}"
            )
        more = {own: value}
        if by_name:
            more = value
        for key, one in more.items():
            options[owner or next(iter(options))][key] = read_value(one)
    return options


def read_value(value: Any) -> Any:
    """Read an int, a float, a bool or None out of a text; anything else stays as it is."""
    words = {"true": True, "false": False, "none": None}
    if not isinstance(value, str):
        return value
    if value.lower() in words:
        return words[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def read_bytes(text: str) -> int:
    """Read a number of bytes out of a text such as 6GiB or 800 MB.

    Raises:
        TrainerError: it is none, or 0.
    """
    found = re.fullmatch(r"([\d.]+) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    try:
        number, prefix, binary = found.groups() if found else ("", "", "")
        count = int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))
    except ValueError:
        count = 0
    if count < 1:
        raise TrainerError(f"--memory {text} is no size of a memory, such as 6GiB or 800MB.")
    return count


def spelled(words: Sequence[str], settings: type) -> list[str]:
    """Write flags as jsonargparse reads them.

    `--image-size` becomes `--image_size`, `--quiet` `--quiet=true`, `--option rank=4` `--option.rank=4`, and
    one of a list, such as `--target a`, `--target+=a`.

    Args:
        words: of the command line.
        settings: the dataclass whose fields are the flags.

    Raises:
        TrainerError: an option is no `NAME=VALUE`.
    """
    types = {own.name: own.type for own in fields(settings)}
    result: list[str] = []
    waiting = ""
    for place, word in enumerate(words):
        name, sign, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        repeated = "list[" in str(types.get(name)) or "dict[" in str(types.get(name))
        if waiting:
            result.append(_one_of(waiting, word))
            waiting = ""
        elif not word.startswith("--"):
            result.append(word)
        elif repeated and sign:
            result.append(_one_of(name, value))
        elif repeated:
            waiting = name
        elif types.get(name) is bool and not sign and not _is_switch(words[place + 1 : place + 2]):
            result.append(f"--{name}=true")
        else:
            result.append(f"--{name}{sign}{value}")
    if waiting:
        result.append(f"--{waiting}")
    return result


def _is_switch(following: Sequence[str]) -> bool:
    return len(following) == 1 and following[0].lower() in ("true", "false")


def _one_of(name: str, value: str) -> str:
    if name not in ("option", "model_option"):
        return f"--{name}+={value}"
    key, sign, text = value.partition("=")
    if not (sign and key):
        raise TrainerError(f"{flag(name)} {value} is not of the form NAME=VALUE, such as rank=4.")
    # jsonargparse reads dots as nesting, and would forget one option of a method over the next.
    return f"--{name}.{key.replace('.', '/')}={text}"
