"""Many runs beside each other on Ray Tune, on this machine or a cluster, each once."""

import json
import os
import shutil
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.errors import TrainerError
from trainer.run import run
from trainer.settings import Settings
from trainer.tasks import TASKS
from trainer.together import End, train_together

from .groups import grouped
from .trials import Trial

# Before Ray is imported: it reports its use to its makers otherwise, and medical networks are closed ones.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Its newer output prints tables of the trials even where it is asked for none.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
# Its workers are 15 nicer than who starts them, and hardly run on a machine that others use too.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from ray import tune

EXAMPLES = Path(__file__).parent.parent


@dataclass(frozen=True)
class Machines:
    """Where the runs are.

    Attributes:
        address: of a Ray cluster; None for this machine.
        cpus: that Ray may use here; None for all.
        cpus_per_trial: processors of a run.
        gpus_per_trial: graphics cards of a run; None for one on a machine that has any.
        together: how many runs may be trained at once as one.
    """

    address: str | None = None
    cpus: int | None = None
    cpus_per_trial: float = 1
    gpus_per_trial: float | None = None
    together: int = 1

    def start(self) -> None:
        """Start Ray on this machine, or join a cluster, whose machines then get these scripts.

        Raises:
            TrainerError: there is no such cluster, or it lets nobody in without its token.
        """
        if ray.is_initialized():
            return
        if self.address is None:
            # "local": otherwise Ray joins whatever was started on this machine, or what is left of it.
            ray.init(
                address="local",
                num_cpus=self.cpus,
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
            )
            return
        scripts = {"working_dir": str(EXAMPLES)}
        try:
            ray.init(address=self.address, runtime_env=scripts, configure_logging=False, log_to_driver=False)
        except ConnectionError as error:
            raise TrainerError(
                f"--address {self.address} cannot be joined: {error}. Check that 'ray status' works here. "
                "A cluster with a token needs RAY_AUTH_MODE=token in the environment, and its head's token."
            ) from error

    def resources(self) -> dict[str, float]:
        """Say what a run takes."""
        gpus = self.gpus_per_trial
        if gpus is None:
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray has no types there
            gpus = float(resources.get("GPU", 0) > 0)
        return {"cpu": self.cpus_per_trial, "gpu": gpus}


def run_all(trials: Sequence[Trial], machines: Machines) -> dict[Path, str]:
    """Run what is not finished yet, each run once; give the folders of those that failed, with the reason.

    Raises:
        KeyboardInterrupt: it was interrupted; the same call goes on.
        TrainerError: Ray broke off; the same call goes on.
    """
    waiting = list({trial.folder: trial for trial in trials if not trial.finished()}.values())
    if not waiting:
        return {}
    groups = grouped(waiting, machines.together)
    machines.start()
    storage = waiting[0].folder.parent.parent / "ray"
    results = fit(tuner_of(groups, machines, storage))
    # What Ray notes about its trials is not needed again: finished is what has its metrics.
    shutil.rmtree(storage, ignore_errors=True)
    failed = _failed(results, groups)
    if any(not trial.finished() and trial.folder not in failed for trial in waiting):
        # Ray took the interrupt for itself.
        raise KeyboardInterrupt
    return failed


def tuner_of(groups: Sequence[Sequence[Trial]], machines: Machines, storage: Path) -> tune.Tuner:
    """Make Ray's tuner of groups of runs, each group in a process.

    Args:
        groups: runs that train at once.
        machines: where.
        storage: a folder for what Ray notes.
    """
    trainable = tune.with_parameters(_train, groups=[[one.settings for one in group] for group in groups])
    return tune.Tuner(
        tune.with_resources(trainable, machines.resources()),
        param_space={"number": tune.grid_search(list(range(len(groups))))},
        # Importing PyTorch and all the rest takes as long as some runs do.
        tune_config=tune.TuneConfig(reuse_actors=True),
        run_config=tune.RunConfig(
            storage_path=str(storage),
            # A run whose machine went away goes on elsewhere from its last epoch.
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=[Progress(len(groups), lambda one: _outcome(groups[one.config["number"]], one))],
            verbose=0,
        ),
    )


def _failed(results: tune.ResultGrid, groups: Sequence[Sequence[Trial]]) -> dict[Path, str]:
    """Give the folders of the runs that failed, with the reason."""
    failed: dict[Path, str] = {}
    for number in range(len(results)):
        result = results[number]
        group = groups[(result.config or {})["number"]]
        if result.error:
            failed |= {trial.folder: f"its process died: {result.error}" for trial in group}
            continue
        for trial, outcome in zip(group, json.loads((result.metrics or {}).get("runs", "[]")), strict=False):
            if "failed" in outcome:
                failed[trial.folder] = outcome["failed"]
    return failed


def fit(tuner: tune.Tuner) -> tune.ResultGrid:
    """Run the trials of a tuner.

    Raises:
        TrainerError: Ray broke off, as where its watch over the memory ends a process that just begins.
    """
    try:
        return tuner.fit()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise TrainerError(
            f"Ray broke off: {reason} What is finished is kept, and the same command goes on from there."
        ) from error


class Progress(tune.Callback):
    """Print a line for every run that ends.

    Args:
        total: how many there are.
        describe: says what a trial was and what came of it.
    """

    def __init__(self, total: int, describe: Callable[[Any], str]) -> None:
        self.total, self.describe = total, describe
        self.ended = 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print it."""
        self.ended += 1
        seconds = trial.last_result["time_total_s"]
        print(f"[{self.ended}/{self.total}] {self.describe(trial)} ({seconds:.0f} s)", flush=True)


def _outcome(group: Sequence[Trial], ended: Any) -> str:
    lines = []
    for trial, outcome in zip(group, json.loads(ended.last_result["runs"]), strict=True):
        if "failed" in outcome:
            lines.append(f"{trial}: failed. {outcome['failed']}")
        else:
            lines.append(f"{trial}: {outcome['words']} {outcome['score']:.3f}")
    if len(lines) > 1:
        lines.insert(0, f"{len(group)} runs {ended.last_result['how']}")
    return "\n  ".join(lines)


def _train(config: dict[str, int], groups: Sequence[Sequence[Settings]]) -> dict[str, Any]:
    """Train and test the runs of a group, in a process of Ray's."""
    several = groups[config["number"]]
    ends: list[End] = [partial(run, own) for own in several]
    how = "at once"
    if len(several) > 1:
        try:
            ends = train_together(several)
        # Each by itself, a run may still go well, in less memory say, or say what is wrong with it.
        except Exception as error:
            how = f"one by one, for at once they failed: {_reason(error)}"
    runs = [_end(own, end) for own, end in zip(several, ends, strict=True)]
    # As text: Ray warns of lists.
    return {"runs": json.dumps(runs), "how": how}


def _end(own: Settings, end: End) -> dict[str, Any]:
    """Bring a run to its end, and say what came of it."""
    folder = Path(str(own.output))
    try:
        metrics, task = end(), TASKS[own.task]
        # What resuming took is not needed any more; for full fine-tuning it is several times the model.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return {"score": metrics["test"][task.score], "words": task.words[task.score]}
    # Whatever it is, it ends one run and not the study: a learning rate at which the loss is no number, a
    # model too large.
    except Exception as error:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return {"failed": _reason(error)}


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
