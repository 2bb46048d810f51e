"""Parameter-efficient fine-tuning for medical image analysis, on any PyTorch model."""

from . import methods as _methods  # noqa: F401 - registers the built-in methods; the name is taken by the function below
from .adapter import Adapter as Adapter
from .adapter import Site as Site
from .check import check as check
from .checkpoint import inspect as inspect
from .checkpoint import load as load
from .checkpoint import save as save
from .errors import CheckpointError as CheckpointError
from .errors import MedpeftError as MedpeftError
from .header import Header as Header
from .merging import merge as merge
from .merging import merged as merged
from .model import apply as apply
from .model import disabled as disabled
from .model import remove as remove
from .optimizer import parameter_groups as parameter_groups
from .planning import Plan as Plan
from .planning import plan as plan
from .registry import methods as methods
from .registry import register as register
from .registry import search_space as search_space
from .report import Report as Report
from .report import report as report


def __getattr__(name: str) -> str:
    # Reading the version from the package's metadata would cost every import a few milliseconds.
    if name == "__version__":
        from importlib.metadata import version

        return version("medpeft")
    raise AttributeError(f"module 'medpeft' has no attribute {name!r}")
