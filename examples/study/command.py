"""Many runs of the trainer: which method, with how many images, at which settings.

    python examples/study.py compare --image-size 64 --epochs 3 --seed 0 1
    python examples/study.py volume --method full ssf --fraction 0.1 0.3 1 --image-size 64 --epochs 3
    python examples/study.py tune --method lora --samples 8 --image-size 64 --epochs 3

Offline each takes minutes on the trainer's default data; then on your own, with --data my/images and, for a
fair comparison, a learning rate of its own for each method: --lr-factors 0.3 1 3. Every flag of train.py goes
to all runs. They share the processors and graphics cards of this machine, or of a Ray cluster (--address).
Killed, the same command goes on with what is missing.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from jsonargparse import ArgumentParser, Namespace
from trainer.errors import TrainerError
from trainer.flags import spelled
from trainer.settings import Settings

import medpeft

from .asked import all_rows, tries_of
from .cluster import Machines, run_all
from .page import Page, about, file_name, write_comparison, write_volume
from .rates import tuned
from .runs import write_runs
from .search import search
from .trials import Trial, make_trial, name_of

# What a comparison sets itself, or takes several values for; a search takes them as train.py does.
OWN = {"data", "model", "method", "seed", "k_folds", "fold"}
PLACE = {"output", "quiet"}


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give 1 if a run failed, 2 after bad input, 130 after an interruption."""
    words = sys.argv[1:] if given is None else list(given)
    try:
        args = make_parser().parse_args(spelled(words, Settings))
        own, settings = args[args.subcommand], given_settings(words)
        check(own)
        own.output = own.output or Path("runs") / default_folder(args.subcommand, settings)
        own.output.mkdir(parents=True, exist_ok=True)
        with FileLock(own.output / "study.lock", timeout=0):
            if args.subcommand == "tune":
                return run_tune(own, settings)
            return run_study(args.subcommand, own, settings, shlex.join(["study.py", *words]))
    except Timeout:
        error: Exception = TrainerError(
            f"Another study is at work in {own.output}. Wait for it, or take another."
        )
    except (TrainerError, medpeft.MedpeftError) as raised:
        error = raised
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    print(f"study.py: {error}", file=sys.stderr)
    return 2


def make_parser() -> ArgumentParser:
    """Declare the flags of the three commands; each takes those of train.py too."""
    parser = ArgumentParser(prog="study.py", description=__doc__)
    commands = parser.add_subcommands()
    for name in ("compare", "volume", "tune"):
        own = ArgumentParser(description=__doc__)
        declare_machines(own)
        if name == "tune":
            declare_tune(own)
        else:
            declare_rows(own)
            declare_together(own)
        if name == "volume":
            declare_shares(own)
        own.add_class_arguments(Settings, skip=PLACE if name == "tune" else PLACE | OWN)
        commands.add_subcommand(name, own)
    return parser


def declare_machines(parser: ArgumentParser) -> None:
    """Declare where the runs are."""
    add = parser.add_argument
    add("--output", type=Path, help="folder of the runs and the results (default: runs/COMMAND)")
    add("--address", help="HOST:PORT of a Ray cluster to join, or auto (default: start Ray here)")
    add("--cpus", type=int, help="processors that Ray may use here (default: all)")
    add("--cpus_per_trial", type=float, default=1, help="processors of a run")
    add("--gpus_per_trial", type=float, help="graphics cards of a run (default: 1 where there are any)")


def declare_together(parser: ArgumentParser) -> None:
    """Declare how many runs are trained at once."""
    text = (
        "train up to K runs that differ in learning rate alone at once, on one processor or graphics card, "
    )
    text += "where they share most of what is computed; what such a run costs by itself is not known then"
    parser.add_argument("--together", type=int, default=1, metavar="K", help=text)


def declare_rows(parser: ArgumentParser) -> None:
    """Declare what is compared."""
    add = parser.add_argument
    add("--data", nargs="+", default=[None], help="data sets (default: train.py's)")
    add("--model", nargs="+", default=[Settings().model], help="timm models")
    add("--method", nargs="*", help="methods or unions (default: every method that fits)")
    text = "YAML files of settings, such as tune writes; each takes the place of its method, and two for one "
    text += (
        "method make two rows, named as the files; a file may hold many rows by their names below `rows`. "
    )
    text += "With --method and no name, these are the only rows"
    add("--config", nargs="+", type=Path, default=[], help=text)
    add("--row", nargs="+", help="of all these rows, run and show only those of these names")
    add("--seed", nargs="+", type=int, default=[0, 1, 2], help="each is a split, a head, an order of images")
    add("--k_folds", type=int, default=0, help="K runs with each seed, each tested on another fold")
    add("--baseline", help="row to compare with (default: the full fine-tuning that validates best)")
    text = "a difference whose interval lies within ±X is none that matters: the rows are level"
    add("--margin", type=float, default=0.02, help=text)
    add("--lr_factors", nargs="+", type=float, help="try each method's learning rate times each X")
    add("--lr_epochs", type=int, help="epochs of those trials (default: those of the runs)")
    add(
        "--lr_seed",
        nargs="+",
        type=int,
        help="judge a rate by its mean over these seeds (default: the first)",
    )


def declare_shares(parser: ArgumentParser) -> None:
    """Declare the shares of the training images."""
    shares = [0.01, 0.05, 0.1, 0.25, 0.5, 1.0]
    parser.add_argument(
        "--fraction", nargs="+", type=float, default=shares, help="shares of the training images"
    )
    text = "an epoch goes through a smaller share more often, for the steps of the whole, but at most X times"
    parser.add_argument("--stretch", type=float, default=20.0, help=text)


def declare_tune(parser: ArgumentParser) -> None:
    """Declare how much is searched."""
    add = parser.add_argument
    add("--samples", type=int, default=16, help="settings to try")
    add("--grace", type=int, default=1, help="epochs before one can be stopped early")
    add("--reduction", type=int, default=3, help="of so many, ASHA goes on with the best one")


def run_study(command: str, args: Namespace, given: dict[str, Any], line: str) -> int:
    """Run what is missing and write the results; give the exit status, 1 if a run failed."""
    folder, machines = args.output, machines_of(args)
    rows, missing = all_rows(args, given)
    tried: list[Trial] = []
    if args.lr_factors:
        rows, failed, tried = tuned(rows, given, args.lr_factors, tries_of(args), folder, machines)
        missing += failed
    trials = []
    for data, seed, fold in product(args.data, args.seed, range(max(args.k_folds, 1))):
        for row in rows:
            if row.settings["data"] == data:
                own = row.with_settings(seed=seed, k_folds=args.k_folds, fold=fold)
                trials.append(make_trial(own, given, folder))
    reasons = run_all(trials, machines)
    missing += [f"{trial} failed: {reasons[trial.folder]}" for trial in trials if not trial.finished()]
    done = [trial.record() for trial in trials if trial.finished()]
    write_runs({"rate": [trial.record() for trial in tried if trial.finished()], "test": done}, folder)
    if done:
        title, write = "Which method for these data?", write_comparison
        if command == "volume":
            title, write = "How many images does each method need?", write_volume
        page = Page(title, line, about(done, len(trials)), missing)
        print("\n" + write(done, page, folder, args.baseline, args.margin))
        print("\n".join([*page.answers, *page.cautions]))
    print("\n".join([*missing, f"{len(done)} of {len(trials)} runs are in {folder / 'report.html'}"]))
    return int(len(done) < len(trials) or not done)


def run_tune(args: Namespace, given: dict[str, Any]) -> int:
    """Search the settings of a method; give the exit status."""
    settings = Settings(**given, quiet=True).checked()
    how = {"samples": args.samples, "grace": args.grace, "reduction": args.reduction}
    trials = search(settings, given, how, args.output, machines_of(args))
    print(trials.head(10).to_string(index=False, float_format="{:.4g}".format))
    print(f"\nTrain with the best: train.py --config {args.output / 'best.yaml'}")
    return 0


def check(args: Namespace) -> None:
    """Raise a TrainerError for flags that do not go together."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TrainerError("torchrun would run the whole study in every process. Start it as one command.")
    if args.devices != 1:
        raise TrainerError(
            f"--devices is {args.devices}, and a run trains on one device, which Ray gives it. Leave it out; "
            "runs are beside each other on all devices there are."
        )
    if "lr_seed" not in args:
        return
    if args.together < 1:
        raise TrainerError(f"--together is {args.together}; it must be at least 1, for runs one by one.")
    names = [name_of(data) for data in args.data]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise TrainerError(f"--data has two data sets called {twice[0]}. Rename one: tables show the name.")
    if args.k_folds < 0 or args.k_folds == 1:
        raise TrainerError(
            f"--k-folds is {args.k_folds}; take at least 2 folds, or 0 for one split of each seed."
        )
    if not args.margin >= 0:
        raise TrainerError(f"--margin is {args.margin}; it must be at least 0.")
    if args.lr_seed and not args.lr_factors:
        raise TrainerError("--lr-seed says where rates are tried, and --lr-factors which. Add --lr-factors.")
    for share in args.get("fraction", []):
        if not 0 < share <= 1:
            raise TrainerError(
                f"--fraction {share:g} is no share: give numbers above 0 and at most 1, such as 0.1."
            )


def default_folder(command: str, given: dict[str, Any]) -> str:
    """Name a study's folder; a search has one for each method."""
    if command != "tune":
        return command
    settings = Settings(**given)
    return f"tune-{name_of(settings.data)}-{file_name(settings.model)}-{settings.method}"


def machines_of(args: Namespace) -> Machines:
    """Read where the runs are to be."""
    together = args.get("together", 1)
    return Machines(args.address, args.cpus, args.cpus_per_trial, args.gpus_per_trial, together)


def given_settings(words: Sequence[str]) -> dict[str, Any]:
    """Give the trainer's settings that a command line sets, without the defaults."""
    args = make_parser().parse_args(spelled(words, Settings), defaults=False)
    own = vars(args[args.subcommand])
    names = set(vars(Settings())) - PLACE
    if args.subcommand != "tune":
        names -= OWN
    return {name: value for name, value in own.items() if name in names}
