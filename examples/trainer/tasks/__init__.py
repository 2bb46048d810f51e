"""What can be asked about images, a file each: a label, several findings, a grade, a quantity, a mask."""

from .classify import Classify
from .multilabel import Multilabel
from .ordinal import Ordinal
from .outcome import Mistake, Outcome, Targets
from .regress import Regress
from .segment import Segment
from .task import Task

TASKS: dict[str, type[Task]] = {
    "classify": Classify,
    "multilabel": Multilabel,
    "ordinal": Ordinal,
    "regress": Regress,
    "segment": Segment,
}

__all__ = ["TASKS", "Mistake", "Outcome", "Targets", "Task"]
