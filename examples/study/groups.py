"""Which runs of a study are trained at once: those that differ in their rate alone, where it saves enough."""

from collections.abc import Sequence
from dataclasses import replace

from trainer.errors import TrainerError
from trainer.settings import Settings
from trainer.together import why_apart

import medpeft

from .trials import Trial


def grouped(trials: Sequence[Trial], most: int) -> list[list[Trial]]:
    """Put runs that are better trained at once into groups of at most so many, others into one of their own.

    A run that was cut off by itself stays so: it goes on from its last epoch.
    """
    alone: list[list[Trial]] = []
    alike: dict[str, list[Trial]] = {}
    for trial in trials:
        if most < 2 or (trial.folder / "checkpoints" / "last.ckpt").exists():
            alone.append([trial])
        else:
            alike.setdefault(common(trial.settings), []).append(trial)
    groups: list[list[Trial]] = []
    for several in alike.values():
        size = min(most, len(several))
        if size > 1 and _gains(several[0], size):
            groups += [several[start : start + size] for start in range(0, len(several), size)]
        else:
            alone += [[trial] for trial in several]
    # What takes longest begins first.
    return groups + alone


def common(settings: Settings) -> str:
    """Name what runs have in common that can be trained at once."""
    return str(replace(settings, lr=None, weight_decay=0.0, output=None))


def _gains(trial: Trial, count: int) -> bool:
    """Ask whether so many runs like this one are better trained at once; say why not."""
    try:
        reason = why_apart(trial.settings, count)
    except (TrainerError, medpeft.MedpeftError):
        return False  # Run by itself, it says what is wrong.
    if reason is not None:
        print(f"{trial.label} on {trial.settings.model}, {trial.data}: one by one, for {reason}", flush=True)
    return reason is None
