"""What `--export` writes into a run's folder, now or once the run is finished."""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

from medpeft.adapters.registry import find

from ..errors import TrainerError
from ..networks.names import LAYERS
from ..settings import Settings
from .bundle import write_bundle
from .merged import write_merged
from .model import Trained, trained_model
from .onnx import write_onnx

KINDS: dict[str, tuple[str, Callable[[Trained, Path], None]]] = {
    "merged": ("merged.safetensors", write_merged),
    "onnx": ("model.onnx", write_onnx),
    "bundle": ("bundle", write_bundle),
}
# Of these, others build the network without medpeft.
PLAIN = ("merged", "bundle")
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_exports(settings: Settings) -> None:
    """Check before the training that what is asked for can be written.

    Raises:
        TrainerError: a package is missing, or the method, task or strategy does not allow it.
    """
    if settings.export and settings.strategy == "fsdp2":
        raise TrainerError("--export needs whole weights, and --strategy fsdp2 shards them. Leave one out.")
    for kind in settings.export:
        if kind in PLAIN:
            _check_mergeable(settings, kind)
            _check_definition(settings, kind)
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if "onnx" in settings.export and missing:
        raise TrainerError(f"--export onnx needs {' and '.join(missing)}: pip install 'medpeft[onnx]'.")


def _check_mergeable(settings: Settings, kind: str) -> None:
    """Raise a TrainerError for a method that leaves more than plain weights."""
    for name in settings.option:
        reason = find(name).unmergeable
        if reason:
            raise TrainerError(
                f"--export {kind} needs a method that merges, and {name} does not: {reason}. Take onnx."
            )


def _check_definition(settings: Settings, kind: str) -> None:
    """Raise a TrainerError for a network that no file can say how to build."""
    for name, value in settings.model_option.items():
        if str(value).rpartition(".")[0] in LAYERS:
            raise TrainerError(
                f"--export {kind} says in JSON how the network is built, and --model-option {name}={value} "
                "is a class of Python. Take onnx."
            )
    if kind == "bundle" and settings.model.startswith("local-dir:"):
        raise TrainerError(
            f"--export bundle is for others, and --model {settings.model} is built from a folder of this "
            "machine. Take merged or onnx."
        )


def export(settings: Settings) -> list[Path]:
    """Write what is asked for and not there yet, each whole or not at all; give what was written.

    Raises:
        TrainerError, medpeft.MedpeftError: it cannot be, or it predicts something else.
    """
    written = []
    for kind in settings.export:
        name, write = KINDS[kind]
        path = Path(str(settings.output)) / "export" / name
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f"{name}.unfinished")
        # It is there if a process was killed.
        _remove(unfinished)
        try:
            write(trained_model(settings), unfinished)
            unfinished.rename(path)
        finally:
            _remove(unfinished)
        written.append(path)
    return written


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
