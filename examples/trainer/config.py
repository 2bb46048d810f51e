"""Flags from a YAML file, as if they were given before those of the command line, which win."""

import argparse
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import TrainerError


def with_config(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE` before the given ones.

    Args:
        parser: it knows `--config` and every flag that the file may hold.
        given: the command line.

    Raises:
        TrainerError: the file cannot be read, is no mapping, or has a key that is no flag.
    """
    return [*_content(parser, given)[0], *given]


def without_config(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[str]:
    """Put the flags of `--config FILE` in its place: for a process that has another working folder, or another disk.

    Args:
        parser: as for `with_config`.
        given: the command line.

    Raises:
        TrainerError: as for `with_config`.
    """
    flags, rest = _content(parser, given)
    return [*flags, *rest]


def write_config(settings: Mapping[str, Any], file: Path) -> None:
    """Write settings that `--config` reads."""
    file.write_text(yaml.safe_dump({k: v for k, v in settings.items() if v is not None}, sort_keys=False))


def _content(parser: argparse.ArgumentParser, given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Give the flags of the file that a command line names, and the rest of the command line."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    named, rest = early.parse_known_args(list(given))
    file = named.config
    if file is None:
        return [], rest
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    flags: list[str] = []
    for key, value in _read(file).items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise TrainerError(_unknown(file, str(key), list(actions)))
        # A list on the command line replaces the file's; options are joined one by one.
        if name == "target" and "--target" in given:
            continue
        flags += _as_flags(file, actions[name], value)
    return flags, rest


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainerError(f"--config {file} could not be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TrainerError(
            f"--config {file} holds a {type(content).__name__}. Write one flag a line, such as 'method: lora'."
        )
    return content


def _unknown(file: Path, key: str, names: list[str]) -> str:
    spelled = [name.replace("_", "-") for name in names]
    near = difflib.get_close_matches(key.replace("_", "-"), spelled, 1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"--config {file} has the key '{key}', and train.py no flag --{key}.{hint} See --help."


def _as_flags(file: Path, action: argparse.Action, value: Any) -> list[str]:
    """Spell one key as flags; `option` may be a mapping, also one a method."""
    flag = action.option_strings[0]
    if value is None:
        return []
    if action.dest == "option":
        return [part for pair in _pairs(file, value) for part in (flag, pair)]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TrainerError(f"--config {file}: '{flag[2:]}' is {value!r}; write true or false.")
        return [flag] if value else []
    if action.nargs == "?" and isinstance(value, bool):
        return [flag] if value else []
    values = value if isinstance(value, list) and isinstance(action, argparse._AppendAction) else [value]
    if any(isinstance(item, (list, dict, bool)) for item in values):
        raise TrainerError(f"--config {file}: '{flag[2:]}' is {value!r}; one value is needed.")
    # With "=", so that a value may begin with a dash.
    return [f"{flag}={item}" for item in values]


def _pairs(file: Path, options: Any) -> list[str]:
    if isinstance(options, list):
        return [str(pair) for pair in options]
    if not isinstance(options, dict):
        raise TrainerError(
            f"--config {file}: 'option' is {options!r}. Write a mapping, such as 'option: {{rank: 4}}'."
        )
    pairs = []
    for name, value in options.items():
        nested = value.items() if isinstance(value, dict) else None
        pairs += [f"{name}={value}"] if nested is None else [f"{name}.{k}={v}" for k, v in nested]
    return pairs
