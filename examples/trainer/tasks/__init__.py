"""What can be asked about images, a file each: a label, several findings, a grade, a quantity."""

from .classify import Classify
from .multilabel import Multilabel
from .ordinal import Ordinal
from .regress import Regress
from .task import Mistake, Outcome, Targets, Task

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "multilabel": Multilabel,
    "ordinal": Ordinal,
    "regress": Regress,
}

__all__ = ["TASKS", "Mistake", "Outcome", "Targets", "Task"]
