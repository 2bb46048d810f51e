"""The flags that the experiments share: those of `train.py`, several values at once, and all its others as they are."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import TrainerError
from trainer.models import DEFAULT

from .cells import Split


def make_parser(description: str, output: str) -> argparse.ArgumentParser:
    """Declare the flags of a study.

    Args:
        description: what `--help` opens with.
        output: the default folder.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag goes to all runs of train.py, such as --epochs 8 --image-size 224: see train.py --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--data", nargs="+", type=Path, default=[None], metavar="PATH", help="data sets (default: train.py's)"
    )
    add("--model", nargs="+", default=[DEFAULT], metavar="NAME", help=f"timm models (default: {DEFAULT})")
    add("--method", nargs="*", metavar="NAME", help="methods or unions (default: every method that fits)")
    add(
        "--config",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="YAML files of train.py's flags, such as tune.py writes; each takes the place of its method, and two for one "
        "method make two rows, named as the files. With --method and no name, these are the only rows",
    )
    add("--seed", nargs="+", type=int, default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add(
        "--k-folds",
        type=int,
        default=0,
        metavar="K",
        help="cross-validation: K runs with each seed, each tested on another fold",
    )
    add(
        "--output",
        type=Path,
        default=Path(output),
        metavar="DIR",
        help=f"where records and results go (default: {output})",
    )
    add(
        "--shard",
        type=shard,
        default=(1, 1),
        metavar="I/N",
        help="run only the I-th of every N runs: one for each machine",
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, given: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags; give the study's own, with its `splits` of the data, and those for every run.

    Raises:
        TrainerError: a flag that the study sets itself, two data sets of one name, or a start by torchrun.
    """
    args, shared = parser.parse_known_args(given)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainerError(
            "torchrun would run the whole study in every process. Start it as one command: with --devices N, every run of it "
            "starts N processes of its own."
        )
    for flag in ("--resume", "--quiet", "--fold"):
        if any(text.partition("=")[0] == flag for text in shared):
            raise TrainerError(
                f"{flag} is set by the study: it resumes, its runs are quiet, and --k-folds runs all folds."
            )
    if args.k_folds < 0 or args.k_folds == 1:
        raise TrainerError(
            f"--k-folds is {args.k_folds}; take at least 2 folds, or 0 for one split of each seed."
        )
    args.splits = [
        Split(seed, args.k_folds, fold) for seed in args.seed for fold in range(max(args.k_folds, 1))
    ]
    names = [path.stem for path in args.data if path is not None]
    if len(set(names)) < len(names):
        raise TrainerError(
            f"--data has two data sets called {max(names, key=names.count)}. Rename one: tables show the name."
        )
    return args, [*shared, "--quiet"]


def shard(text: str) -> tuple[int, int]:
    """Read `2/4`: the second of four."""
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 2/4")
    return int(first), int(second)
