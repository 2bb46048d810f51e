"""What `--export` writes into a run's folder, now or once the run is finished."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from medpeft.adapters.registry import find

from ..errors import TrainerError
from ..networks import LAYERS
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
NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_exports(settings: Settings) -> None:
    """Check before the training that what is asked for can be written.

    Raises:
        TrainerError: a package is missing, or the method, task or strategy does not allow it.
    """
    wanted = set(settings.export)
    if wanted and settings.strategy == "fsdp2":
        raise TrainerError("--export needs whole weights, and --strategy fsdp2 shards them. Leave one out.")
    for name in settings.option:
        reason = find(name).unmergeable
        if reason and wanted & {"merged", "bundle"}:
            kind = min(wanted & {"merged", "bundle"})
            raise TrainerError(
                f"--export {kind} needs a method that merges, and {name} does not: {reason}. Take onnx."
            )
    missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
    if "onnx" in wanted and missing:
        raise TrainerError(f"--export onnx needs {' and '.join(missing)}: pip install 'medpeft[onnx]'.")
    if wanted & {"merged", "bundle"}:
        _check_definition(settings)


def _check_definition(settings: Settings) -> None:
    """Raise a TrainerError for a network that no file can say how to build."""
    kind = min({*settings.export} & {"merged", "bundle"})
    for name, value in settings.model_option.items():
        if str(value).rpartition(".")[0] in LAYERS:
            raise TrainerError(
                f"--export {kind} says in JSON how the network is built, and --model-option {name}={value} "
                "is a class of Python. Take onnx."
            )
    if "bundle" in settings.export and settings.model.startswith("local-dir:"):
        raise TrainerError(
            f"--export bundle is for others, and --model {settings.model} is built from a folder of this "
            "machine. Take merged or onnx."
        )


def export(settings: Settings) -> list[Path]:
    """Write what is asked for and not there yet; give what was written.

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
        write(trained_model(settings), path)
        written.append(path)
    return written
