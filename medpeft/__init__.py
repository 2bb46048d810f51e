"""Parameter-efficient fine-tuning for medical image analysis, on any PyTorch model."""

from . import formulas as _formulas  # noqa: F401 - registers the built-in methods
from .adapters.adapter import Adapter as Adapter
from .adapters.registry import methods as methods
from .adapters.registry import register as register
from .adapters.requests import search_space as search_space
from .architecture.site import Site as Site
from .checkpoint.header import Header as Header
from .checkpoint.load import inspect as inspect
from .checkpoint.load import load as load
from .checkpoint.save import save as save
from .checkpoint.state import load_state as load_state
from .checkpoint.state import state as state
from .checks.check import check as check
from .combining.combine import Combined as Combined
from .combining.combine import combine as combine
from .errors import CheckpointError as CheckpointError
from .errors import MedpeftError as MedpeftError
from .features.file import FeatureFile as FeatureFile
from .features.prefix import Prefix as Prefix
from .features.prefix import prefix as prefix
from .optimizer import parameter_groups as parameter_groups
from .privacy import Private as Private
from .privacy import private as private
from .reports.attribution import Attribution as Attribution
from .reports.attribution import attribute as attribute
from .reports.fits import Fits as Fits
from .reports.fits import fits as fits
from .reports.report import Report as Report
from .reports.report import report as report
from .serving.bank import Bank as Bank
from .serving.proof import Proof as Proof
from .surgery.apply import apply as apply
from .surgery.apply import remove as remove
from .surgery.merge import merge as merge
from .surgery.merge import merged as merged
from .surgery.plan import Plan as Plan
from .surgery.plan import plan as plan
from .surgery.strength import disabled as disabled
from .surgery.strength import scaled as scaled

__all__ = [
    "Adapter",
    "Attribution",
    "Bank",
    "CheckpointError",
    "Combined",
    "FeatureFile",
    "Fits",
    "Header",
    "MedpeftError",
    "Plan",
    "Prefix",
    "Private",
    "Proof",
    "Report",
    "Site",
    "apply",
    "attribute",
    "check",
    "combine",
    "disabled",
    "fits",
    "inspect",
    "load",
    "load_state",
    "merge",
    "merged",
    "methods",
    "parameter_groups",
    "plan",
    "prefix",
    "private",
    "register",
    "remove",
    "report",
    "save",
    "scaled",
    "search_space",
    "state",
]

# Messages, help and pickles then show a public name by the path that a user writes.
for _name in __all__:
    globals()[_name].__module__ = "medpeft"
del _name


def __getattr__(name: str) -> str:
    # Reading the version from the package's metadata would cost every import a few milliseconds.
    if name == "__version__":
        from importlib.metadata import version

        return version("medpeft")
    raise AttributeError(f"module 'medpeft' has no attribute {name!r}")
