"""The trainer's settings: flags, a YAML file, and defaults that depend on other flags."""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import with_config
from .declared import RATE, RATES, declare_flags
from .errors import TrainerError

# What may change between a run and its continuation.
FREE = {
    "config",
    "output",
    "resume",
    "num_workers",
    "patience",
    "quiet",
    "no_figures",
    "save_every",
    "accelerator",
    "devices",
    "strategy",
}


def make_parser(description: str) -> argparse.ArgumentParser:
    """Declare the flags of `train.py`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    declare_flags(parser)
    return parser


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        TrainerError: a flag has a value that cannot be meant.
    """
    args = parser.parse_args(with_config(parser, sys.argv[1:] if given is None else given))
    for name in ("epochs", "patience", "batch_size", "image_size", "accumulate", "devices"):
        if getattr(args, name) < 1:
            raise TrainerError(f"{_flag(name)} is {getattr(args, name)}; it must be at least 1.")
    if not 0 < args.train_fraction <= 1:
        raise TrainerError(f"--train-fraction is {args.train_fraction}; it must be above 0 and at most 1.")
    if args.k_folds < 0 or args.k_folds == 1 or not 0 <= args.fold < max(args.k_folds, 1):
        raise TrainerError(
            f"--k-folds is {args.k_folds} and --fold {args.fold}; take at least 2 folds, numbered from 0."
        )
    if args.save_every < 0:
        raise TrainerError(f"--save-every is {args.save_every}; it must be at least 0.")
    if not 0 <= args.seed < 1_000_000:
        raise TrainerError(f"--seed is {args.seed}; it must be from 0 to 999999.")
    if args.cache_features is not None:
        # A feature is computed once: there is one view of each image.
        args.augment = "none"
    args.option = read_options(args.method, args.option)
    if args.lr is None:
        args.lr = min(RATES.get(name, RATE) for name in args.option)
    if args.lr <= 0:
        raise TrainerError(f"--lr is {args.lr}; it must be above 0.")
    if args.output is None:
        data = Path(str(args.data)).stem if args.data else "tissue"
        args.output = Path("runs") / f"{data}-{args.model}-{args.method}-{args.seed}"
    return args


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Give all flags as plain values, for a file."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe the settings that differ, but for those that a continued run is free to change."""
    return [
        f"{_flag(name)} was {before.get(name)!r} and is {value!r}"
        for name, value in now.items()
        if name not in FREE and before.get(name) != value
    ]


def read_options(method: str, pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Turn `rank=4`, or in a union `lora.rank=4`, into `{"lora": {"rank": 4}}`.

    Raises:
        TrainerError: a pair is no `NAME=VALUE`, or it is not clear whose option it is.
    """
    options: dict[str, dict[str, Any]] = {name.strip(): {} for name in method.split("+")}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        owner, dot, name = key.rpartition(".")
        if not (sign and name):
            raise TrainerError(f"--option {pair} is not of the form NAME=VALUE, such as rank=4.")
        if not dot and len(options) > 1:
            raise TrainerError(
                f"--option {pair} could be for any of {', '.join(options)}. "
                f"Say for which: --option {next(iter(options))}.{pair}"
            )
        if dot and owner not in options:
            raise TrainerError(f"--option {pair} is for '{owner}', and --method is {method}.")
        options[owner if dot else next(iter(options))][name] = read_value(text)
    return options


def read_value(text: str) -> Any:
    """Read an int, a float, a bool or None; anything else is a string."""
    spelled = {"true": True, "false": False, "none": None}
    if text.lower() in spelled:
        return spelled[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
