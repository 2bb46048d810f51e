"""What a run trains with, as the YAML file that `--config` of every script reads."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from trainer.config import write_config
from trainer.flags import make_parser, parse, settings_of

from .cells import IRRELEVANT


def write_settings(args: argparse.Namespace, path: Path, searched: Iterable[str] = ("lr",)) -> None:
    """Write the settings that were searched or are not the defaults, but for those of the data, the split and the place."""
    defaults = settings_of(parse(make_parser(""), []))
    elsewhere = IRRELEVANT | {"data", "method", "option", "seed", "k_folds", "fold"}
    names = [
        name
        for name in defaults
        if name not in elsewhere and (name in searched or vars(args)[name] != defaults[name])
    ]
    content = {"method": args.method} | {name: getattr(args, name) for name in names}
    if options := {name: own for name, own in args.option.items() if own}:
        content["option"] = options
    path.parent.mkdir(parents=True, exist_ok=True)
    write_config(content, path)
