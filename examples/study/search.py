"""All settings of a method by their validation score, with ASHA on Ray Tune."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import pandas as pd
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from trainer.errors import TrainerError
from trainer.run import run
from trainer.settings import Settings
from trainer.tasks import TASKS

import medpeft

from .cluster import Machines, Progress, fit
from .trials import shapes_of, write_settings

DECAYS = (0.0, 0.001, 0.01, 0.1)
AUGMENTATIONS = ("none", "light", "strong")
SCORE = "best_val_score"
WORST = -1e9  # of a trial that broke off: some scores may be negative


def search_space(settings: Settings, given: Mapping[str, Any]) -> dict[str, Any]:
    """Give what Ray Tune draws from.

    Args:
        settings: of the trainer, checked. An option of the method that they fix is not searched.
        given: the settings that the user set; they are not searched either.

    Returns:
        By name: `lr` from a tenth to tenfold of the trainer's, `weight_decay`, `augment`, and `METHOD.OPTION`
        for each option for which the method declares values worth trying.
    """
    assert settings.lr is not None
    space: dict[str, Any] = {
        "lr": tune.loguniform(settings.lr / 10, settings.lr * 10),
        "weight_decay": tune.choice(DECAYS),
        "augment": tune.choice(AUGMENTATIONS),
    }
    for name in given:
        space.pop(name, None)
    for name, values in medpeft.search_space(settings.option).items():
        space[name] = tune.choice(values)
    if not space:
        raise TrainerError("Nothing is left to search: every setting is given. Leave one out, such as --lr.")
    return space


def start_of(settings: Settings, space: Mapping[str, Any]) -> dict[str, Any]:
    """Give the point that the trainer would take without a search.

    Raises:
        medpeft.MedpeftError: the method does not fit the model.
    """
    planned = medpeft.plan(
        shapes_of(settings),
        settings.option,
        target=settings.target,
        exclude=settings.exclude,
        batchnorm=settings.batchnorm,
    )
    start = {}
    for name in space:
        owner, dot, option = name.rpartition(".")
        start[name] = planned.record.methods[owner][option] if dot else getattr(settings, name)
    return start


def at_point(settings: Settings, point: Mapping[str, Any]) -> Settings:
    """Give the settings with those of a point in their place."""
    option = {name: dict(own) for name, own in settings.option.items()}
    plain = {}
    for name, value in point.items():
        owner, dot, key = name.rpartition(".")
        if dot:
            option[owner][key] = value
        else:
            plain[name] = value
    return replace(settings, **plain, option=option)


class Stopped(BaseException):
    """ASHA ends the trial here."""


class Report(lightning.Callback):
    """Tell Ray Tune of every epoch; a trial that ASHA stops ends there.

    Args:
        watched: what Lightning calls the score.
    """

    def __init__(self, watched: str) -> None:
        self.watched, self.best = watched, WORST

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Report the best score so far."""
        if not trainer.sanity_checking:
            score = float(trainer.callback_metrics[self.watched])
            self.best = max(self.best, score)
            try:
                tune.report({SCORE: self.best, "val_score": score, "epoch": trainer.current_epoch + 1})
            except SystemExit as error:
                # So Ray ends a trial, and so Lightning ends at an interrupt, which this is none of.
                raise Stopped from error


def _try(point: dict[str, Any], settings: Settings, folder: Path) -> None:
    """Train one trial, from its last epoch if it was cut off; runs in a process of Ray's."""
    own = at_point(settings, point)
    # Stopping is ASHA's business: its rungs are for trials that are still under way.
    own = replace(own, patience=own.epochs, quiet=True)
    own = replace(own, output=folder / "runs" / own.digest())
    try:
        run(own, callbacks=[Report(f"val_{TASKS[own.task].score}")])
    except Stopped:
        return
    except (TrainerError, medpeft.MedpeftError) as error:
        # The loss is no number at this rate, or the options do not go together: a bad point, not the end of
        # the search.
        reason = str(error).splitlines()[0]
        tune.report({SCORE: WORST, "val_score": WORST, "epoch": own.epochs, "error": reason})


def make_tuner(
    settings: Settings,
    space: Mapping[str, Any],
    start: Mapping[str, Any],
    how: Mapping[str, int],
    folder: Path,
    machines: Machines,
) -> tune.Tuner:
    """Set up a search, or restore the one that is in the folder."""
    trainable = tune.with_parameters(_try, settings=settings, folder=folder)
    trainable = tune.with_resources(trainable, machines.resources())
    storage, name = folder / "search", "-".join(map(str, [settings.digest(), *how.values()]))
    if tune.Tuner.can_restore(str(storage / name)):
        return tune.Tuner.restore(str(storage / name), trainable=trainable, restart_errored=True)
    scheduler = ASHAScheduler(
        time_attr="epoch", max_t=settings.epochs, grace_period=how["grace"], reduction_factor=how["reduction"]
    )
    points = BasicVariantGenerator(points_to_evaluate=[dict(start)], random_state=settings.seed)
    tried = tune.TuneConfig(
        metric=SCORE,
        mode="max",
        num_samples=how["samples"],
        scheduler=scheduler,
        search_alg=points,
        # A trial that ASHA stops takes a moment to end, for which a reused process does not wait.
        reuse_actors=False,
    )
    kept = tune.RunConfig(
        name=name,
        storage_path=str(storage),
        failure_config=tune.FailureConfig(max_failures=2),
        callbacks=[Progress(how["samples"], _outcome)],
        verbose=0,
    )
    return tune.Tuner(trainable, param_space=dict(space), tune_config=tried, run_config=kept)


def search(
    settings: Settings, given: Mapping[str, Any], how: Mapping[str, int], folder: Path, machines: Machines
) -> pd.DataFrame:
    """Search the settings of a method, or go on with a search; write `trials.csv` and `best.yaml`.

    Args:
        settings: of the trainer, checked.
        given: those among them that the user set.
        how: the number of `samples` to try; the epochs of `grace` before ASHA may stop one; of how many
            trials it goes on with the best one, the `reduction`.
        folder: the study's.
        machines: where.

    Raises:
        KeyboardInterrupt: it was interrupted; the same call goes on.
        TrainerError: no trial could be trained, or there is nothing to search.
    """
    space = search_space(settings, given)
    start = start_of(settings, space)
    machines.start()
    # A trial of Ray's has another working folder.
    tuner = make_tuner(settings.absolute(), space, start, how, folder.resolve(), machines)
    results = fit(tuner)
    ended = 0
    for number in range(len(results)):
        trial = results[number]
        ended += bool(trial.error or (trial.metrics or {}).get("done"))
    if ended < how["samples"]:
        # Ray took the interrupt for itself, to save the state of the search, and gave back what there was.
        raise KeyboardInterrupt
    return write_search(settings, results, start, folder)


def _outcome(trial: Any) -> str:
    point = []
    for name, value in trial.config.items():
        point.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    result = trial.last_result
    return f"{', '.join(point)}: validation score {result[SCORE]:.3f} in {result['epoch']} epochs"


def write_search(
    settings: Settings, results: tune.ResultGrid, start: Mapping[str, Any], folder: Path
) -> pd.DataFrame:
    """Write every trial and the best settings; give the trials, the best first.

    Raises:
        TrainerError: none could be trained.
    """
    if len(results.errors) == len(results):
        raise TrainerError(f"All {len(results)} trials broke off, the first with:\n{results.errors[0]}")
    trials = results.get_dataframe(filter_metric=SCORE, filter_mode="max")
    trials = trials.rename(columns={f"config/{name}": name for name in start}).sort_values(
        SCORE, ascending=False
    )
    shown = trials[[*start, SCORE, "epoch", *trials.columns.intersection(["error"])]]
    shown.to_csv(folder / "trials.csv", index=False)
    if not len(shown) or shown[SCORE].iloc[0] <= WORST:
        raise TrainerError(f"No trial could be trained; {folder / 'trials.csv'} says why.")
    best = results.get_best_result(SCORE, "max", scope="all").config or {}
    point = {name: value for name, value in best.items() if name in start}
    write_settings(at_point(settings, point), folder / "best.yaml", start)
    return shown
