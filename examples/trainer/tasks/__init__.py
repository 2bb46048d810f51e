"""What can be asked about images, a file each: a label, several findings, a grade, a quantity, a mask."""

from .classify import Classify
from .task import Mistake, Outcome, Targets, Task

TASKS: dict[str, type[Task]] = {"classify": Classify}

__all__ = ["TASKS", "Mistake", "Outcome", "Targets", "Task"]
