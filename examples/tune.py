"""Search a method's learning rate, weight decay, augmentation and own options, with ASHA on Ray Tune.

Offline and in minutes, on patches of stained tissue; then on your own data, and train with what was found:

    python examples/tune.py --method lora --image-size 64 --epochs 3 --samples 8
    python examples/tune.py --method lora --data my/images --samples 40 --output runs/tune-lora
    python examples/train.py --config runs/tune-lora/best.yaml --data my/images

What is searched of a method's options is what the method declares (medpeft.search_space). A flag that you give, such as --lr or
--option, is fixed. The first try is the trainer's own settings, so the best of all is no worse on the validation images, which
alone are looked at. It writes trials.csv and best.yaml to --output; compare.py reads best.yaml too. Started again with the same
flags it goes on where it was interrupted.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import torch
import train
from experiments.command import exit_status
from experiments.settings import write_settings
from experiments.space import as_flags, defaults, search_space
from trainer.checkpoint import Training
from trainer.config import without_config
from trainer.errors import TrainerError
from trainer.flags import make_parser as make_run_parser
from trainer.flags import parse as parse_run
from trainer.images import Images
from trainer.preparation import images_of

import medpeft

# Before Ray is imported: it reports its use to its makers otherwise, and medical networks are closed ones.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# It warns that its snapshots are slow where an epoch takes less than five seconds.
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

SCORE = "best_val_macro_f1"


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line; give its exit status."""
    return exit_status("tune.py", run, given)


def make_parser() -> argparse.ArgumentParser:
    """Declare the flags of a search."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Every other flag goes to train.py, such as --method, --data and --epochs: see train.py --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--samples", type=int, default=16, metavar="N", help="settings to try (default: 16)")
    add(
        "--grace",
        type=int,
        default=1,
        metavar="N",
        help="epochs before one can be stopped early (default: 1)",
    )
    add(
        "--reduction",
        type=int,
        default=3,
        metavar="N",
        help="of so many, ASHA goes on with the best one (default: 3)",
    )
    add("--address", metavar="HOST:PORT", help="a Ray cluster to join, or auto (default: start Ray here)")
    add("--cpus", type=int, metavar="N", help="processors that Ray may use here (default: all)")
    add("--cpus-per-trial", type=float, default=1, metavar="N", help="(default: 1)")
    add("--gpus-per-trial", type=float, metavar="N", help="(default: 1 if there is one here, else 0)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        help="where the results go (default: runs/tune-DATA-MODEL-METHOD)",
    )
    add(
        "--storage",
        metavar="PATH",
        help="where trials keep their checkpoints; may be remote, as s3://… (default: --output)",
    )
    return parser


def run(given: Sequence[str] | None = None) -> int:
    """Search, or go on with a search; give the exit status."""
    args, flags = make_parser().parse_known_args(given)
    base = parse_run(make_run_parser(""), [*flags, "--quiet"])
    if base.devices > 1:
        raise TrainerError(
            f"--devices is {base.devices}, and a trial trains on one device, which Ray gives it. Leave --devices out; trials "
            "run beside each other on all devices there are."
        )
    flags = portable(base, flags)
    space = search_space(base, given_names(flags))
    start = defaults(base, space)
    if not space:
        raise TrainerError("Nothing is left to search: every setting is given. Leave one out, such as --lr.")
    data = base.data.stem if base.data else "tissue"
    args.output = args.output or Path("runs") / f"tune-{data}-{base.model}-{base.method}"
    args.output.mkdir(parents=True, exist_ok=True)
    storage = (
        args.storage
        if args.storage and "://" in args.storage
        else str(Path(args.storage or args.output).resolve())
    )
    keep_search(f"{storage}/trials/search.json", args, flags)
    start_ray(args)
    try:
        tuner = make_tuner(args, flags, base, space, start, storage)
        results = tuner.fit()
    finally:
        ray.shutdown()
    trials = [results[i] for i in range(len(results))]
    ended = [trial for trial in trials if trial.error or (trial.metrics or {}).get("done")]
    if len(ended) < args.samples:
        # Ray took the interrupt for itself, to save the state of the search, and gave back what there was.
        raise KeyboardInterrupt
    return write_results(args, flags, results, start)


def portable(base: argparse.Namespace, flags: Sequence[str]) -> list[str]:
    """Give flags that mean the same in a trial, which has a working folder of its own and may be on another machine."""
    own = without_config(make_run_parser(""), flags)
    return own if base.cache_features is None else [*own, f"--cache-features={base.cache_features.resolve()}"]


def given_names(flags: Sequence[str]) -> set[str]:
    """Name the trainer's flags that a command line sets."""
    parser = make_run_parser("")
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(flags)))


def keep_search(file: str, args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Write down what is searched, or check that an interrupted search is this one.

    Raises:
        TrainerError: another search is there, or the place cannot be reached.
    """
    now = {"flags": list(flags), "samples": args.samples, "grace": args.grace, "reduction": args.reduction}
    try:
        filesystem, path = fsspec.core.url_to_fs(file)
    except (ImportError, ValueError) as error:
        raise TrainerError(f"--storage {args.storage} cannot be reached: {error}") from error
    if not filesystem.exists(path):
        filesystem.makedirs(path.rpartition("/")[0], exist_ok=True)
        filesystem.pipe_file(path, json.dumps(now).encode())
        return
    before = json.loads(filesystem.cat_file(path))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise TrainerError(
            f"{file} is of a search with other {', '.join(changed)} ({before[changed[0]]!r}). "
            "Go on with the same command, or choose another --output or --storage."
        )


def start_ray(args: argparse.Namespace) -> None:
    """Start Ray on this machine, or join a cluster, whose machines then get these scripts.

    Raises:
        TrainerError: there is no such cluster, or it lets nobody in without its token.
    """
    if args.address is None:
        ray.init(num_cpus=args.cpus, include_dashboard=False, configure_logging=False)
        return
    try:
        ray.init(address=args.address, runtime_env={"working_dir": str(Path(__file__).parent)})
    except ConnectionError as error:
        raise TrainerError(
            f"--address {args.address} cannot be joined: {error}. Check that 'ray status' works here. A cluster that asks for "
            "a token needs RAY_AUTH_MODE=token in the environment, and the token of its head."
        ) from error


def make_tuner(
    args: argparse.Namespace,
    flags: Sequence[str],
    base: argparse.Namespace,
    space: dict[str, Any],
    start: dict[str, Any],
    storage: str,
) -> tune.Tuner:
    """Set up a search, or restore the one that is in the storage."""
    gpus = args.gpus_per_trial if args.gpus_per_trial is not None else float(torch.cuda.is_available())
    # Read once, here; every trial gets them from Ray, so that a cluster needs no shared folder for them.
    trainable = tune.with_resources(
        tune.with_parameters(train_point, flags=list(flags), images=images_of(base)),
        {"cpu": args.cpus_per_trial, "gpu": gpus},
    )
    if tune.Tuner.can_restore(f"{storage}/trials"):
        return tune.Tuner.restore(f"{storage}/trials", trainable=trainable, resume_errored=True)
    how = tune.TuneConfig(
        metric=SCORE,
        mode="max",
        num_samples=args.samples,
        scheduler=ASHAScheduler(max_t=base.epochs, grace_period=args.grace, reduction_factor=args.reduction),
        search_alg=BasicVariantGenerator(points_to_evaluate=[start], random_state=base.seed),
        # Importing PyTorch and all the rest takes as long as some trials do.
        reuse_actors=True,
    )
    where = tune.RunConfig(
        name="trials", storage_path=storage, checkpoint_config=tune.CheckpointConfig(num_to_keep=1), verbose=1
    )
    return tune.Tuner(trainable, param_space=space, tune_config=how, run_config=where)


def train_point(point: dict[str, Any], flags: list[str], images: Images) -> None:
    """Train one trial from its last checkpoint, and report after each epoch; runs in a process of Ray's."""

    def report(training: Training) -> None:
        scores = [epoch["val_macro_f1"] for epoch in training.history]
        # The folder holds the checkpoint alone as long as the run is under way.
        tune.report(
            {SCORE: max(scores), "val_macro_f1": scores[-1]},
            checkpoint=tune.Checkpoint.from_directory(folder),
        )

    # What is worth keeping, the checkpoint, goes to the storage with each report.
    with tempfile.TemporaryDirectory() as folder:
        args = parse_run(
            make_run_parser(""), [*flags, *as_flags(point), "--quiet", "--resume", f"--output={folder}"]
        )
        # Stopping is ASHA's business: its rungs are for trials that are still under way.
        args.patience = args.epochs
        if checkpoint := tune.get_checkpoint():
            checkpoint.to_directory(folder)
        try:
            train.run(args, images, report)
        except (TrainerError, medpeft.MedpeftError) as error:
            # The loss is no number at this rate, or the options do not go together: a bad point, not the end of the search.
            tune.report({SCORE: 0.0, "val_macro_f1": 0.0, "error": str(error).splitlines()[0]})


def write_results(
    args: argparse.Namespace, flags: Sequence[str], results: tune.ResultGrid, start: dict[str, Any]
) -> int:
    """Write every trial and the best settings, and print them; give the exit status, 1 if a trial broke off."""
    if broken := results.errors:
        print(
            f"{len(broken)} of {len(results)} trials broke off, the first with:\n{broken[0]}", file=sys.stderr
        )
        if len(broken) == len(results):
            return 1
    trials = results.get_dataframe(filter_metric=SCORE, filter_mode="max")
    names = {f"config/{name}": name for name in start} | {"training_iteration": "epoch"}
    shown = trials.rename(columns=names).sort_values(SCORE, ascending=False)
    columns = [*start, SCORE, "epoch", *(["error"] if "error" in shown else [])]
    shown[columns].to_csv(args.output / "trials.csv", index=False)
    if not len(shown) or shown[SCORE].iloc[0] <= 0:
        print("No trial could be trained; trials.csv says why.", file=sys.stderr)
        return 1
    best = results.get_best_result(SCORE, "max", scope="all")
    point = {name: value for name, value in (best.config or {}).items() if name in start}
    settings = parse_run(make_run_parser(""), [*flags, *as_flags(point)])
    write_settings(settings, args.output / "best.yaml", start)
    print(shown[columns].head(10).to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    print(f"\nValidation macro-F1 {shown[SCORE].iloc[0]:.4f} with {args.output / 'best.yaml'}")
    print(f"Train with it: train.py --config {args.output / 'best.yaml'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
