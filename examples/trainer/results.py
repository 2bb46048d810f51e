"""What a run leaves: the adapter, its settings and scores, every prediction, the figures; what it cost."""

import json
import resource
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn

import medpeft

from .data import Preprocessing
from .errors import TrainerError
from .figures import draw_reliability, draw_roc, draw_training, titled
from .images import Integers
from .rows import Images
from .scores import scaled, without_nan
from .settings import Settings
from .splits import NAMES, divided_groups
from .weights import digest

FINISHED, SETTINGS = "metrics.json", "settings.yaml"
_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def earlier(settings: Settings) -> dict[str, Any] | None:
    """Give the metrics of a finished run with the same settings in the same folder, None where there is none.

    Raises:
        TrainerError: the folder has a run with other settings, which is never overwritten.
    """
    folder = Path(str(settings.output))
    written = folder / SETTINGS
    if written.is_file():
        before = yaml.safe_load(written.read_text(encoding="utf-8"))
        changed = settings.changes(before)
        if changed:
            raise TrainerError(
                f"{folder} has a run with other settings: {'; '.join(changed)}. "
                "Go on with the same ones, or choose another --output."
            )
    finished = folder / FINISHED
    if not finished.is_file():
        return None
    if not written.is_file():
        raise TrainerError(f"{folder} has {FINISHED} of something else. Choose another --output.")
    found: dict[str, Any] = json.loads(finished.read_text(encoding="utf-8"))
    return found


def begin(settings: Settings) -> None:
    """Make the folder and write the settings, which `--config` reads."""
    folder = Path(str(settings.output))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings.plain(), sort_keys=False, allow_unicode=True)
        (folder / SETTINGS).write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainerError(f"--output {folder} cannot be written to: {error}") from error


def save_adapter(
    settings: Settings, model: nn.Module, preprocessing: Preprocessing, record: dict[str, Any]
) -> None:
    """Write the adapter with what it takes to use it; called on every process where the model is sharded."""
    metadata = {
        "model": settings.model,
        "pretrained": not (settings.no_pretrained or settings.weights),
        "model_option": settings.model_option,
        "weights": _identity(settings),
        "seed": settings.seed,
        "classes": record["classes"],
        "preprocessing": preprocessing.to_metadata(),
        "volumes": settings.volumes,
        "temperature": record["temperature"],
        "test_macro_f1": record["test"]["macro_f1"],
    }
    medpeft.save(model, Path(str(settings.output)) / "adapter.safetensors", metadata=metadata)


def _identity(settings: Settings) -> dict[str, Any] | None:
    """Say which file the weights came from, for `predict.py`, which needs it again."""
    if settings.weights is None:
        return None
    return {"file": settings.weights.name, "sha256": digest(settings.weights), "head": settings.head}


def write_results(
    settings: Settings, images: Images, rows: Integers, logits: Tensor, record: dict[str, Any]
) -> dict[str, Any]:
    """Write the predictions, the figures and, last of all, the metrics; give these as they are in the file.

    Args:
        settings: of the run.
        images: the data.
        rows: of the test.
        logits: (N, C) of the test.
        record: the metrics.
    """
    folder = Path(str(settings.output))
    probabilities = scaled(logits, record["temperature"])
    names = [images.names[i] for i in rows]
    labels = [images.classes[i] for i in images.labels[rows]]
    write_predictions(folder / "predictions.csv", names, images.classes, probabilities, labels)
    if not settings.no_figures:
        draw(settings, images, rows, logits, record)
    record = without_nan(record)
    unfinished = folder / "metrics.unfinished"
    unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / FINISHED)
    # What an interrupted run would go on from.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def draw(settings: Settings, images: Images, rows: Integers, logits: Tensor, record: dict[str, Any]) -> None:
    """Draw the run."""
    folder, classes = Path(str(settings.output)), images.classes
    labels = torch.from_numpy(images.labels[rows])
    temperature, test = record["temperature"], record["test"]
    probabilities = scaled(logits, temperature)
    source = Path(settings.data or "tissue").stem
    draw_training(
        record["history"],
        record["best_epoch"],
        torch.tensor(test["confusion_matrix"]),
        classes,
        f"{settings.method} on {settings.model}, {source}: test macro-F1 {test['macro_f1']:.3f}",
        folder / "training.png",
    )
    panels = {
        titled("as trained", test["calibration_error_untempered"]): scaled(logits, 1),
        titled(f"temperature {temperature:.2f}", test["calibration_error"]): probabilities,
    }
    draw_reliability(panels, labels, folder / "reliability.png")
    draw_roc(probabilities, labels, classes, folder / "roc.png")


def write_predictions(
    path: Path,
    names: Sequence[str],
    classes: Sequence[str],
    probabilities: Tensor,
    labels: Sequence[str] = (),
) -> None:
    """Write a CSV with the columns `path`, `label` (where known), `prediction`, and one a class, `p(CLASS)`.

    Args:
        path: the file to write.
        names: of the N images.
        classes: the names of the C classes.
        probabilities: (N, C).
        labels: the true classes of the images, none where they are not known.
    """
    table = pd.DataFrame({"path": list(names)})
    if labels:
        table["label"] = list(labels)
    table["prediction"] = [classes[i] for i in probabilities.argmax(1).tolist()]
    for place, name in enumerate(classes):
        table[f"p({name})"] = probabilities[:, place].tolist()
    table.to_csv(path, index=False)


def count(images: Images, rows: Integers) -> dict[str, int]:
    """Count the images of each class among some rows."""
    counts = np.bincount(images.labels[rows], minlength=len(images.classes))
    return dict(zip(images.classes, counts.tolist(), strict=True))


def describe(images: Images, found: dict[str, Integers]) -> str:
    """Lay out how many images of each class are in each part, and what there is to know about the data."""
    table = pd.DataFrame({part: count(images, found[part]) for part in NAMES})
    lines = [table.rename_axis("images").to_string(index_names=False)]
    if images.broken:
        first = images.broken[0]
        lines.append(f"Left out, as they cannot be read: {len(images.broken)} images, the first: {first}")
    lines += images.notes
    divided = divided_groups(images, found)
    if divided:
        lines.append(
            f"Warning: {divided} groups (exact copies, or one patient's images) fall into more "
            "than one part of the split that the data bring, so its scores flatter the model."
        )
    return "\n".join(lines)


def forget_peak(device: torch.device) -> None:
    """Begin a new peak of memory, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Linux: 5 sets the peak of the resident set back to what is resident now (proc_pid_clear_refs, man 5).
    try:
        _RESET.write_text("5")
    except OSError:
        return


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Give the peak in bytes, and what was measured."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "CUDA allocations"
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024, "resident set of the process"
    except (OSError, StopIteration):
        # In KiB, but in bytes on macOS; of the whole life of the process.
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, "resident set of the process"


def saved_bytes(model: nn.Module, batch: int, shape: tuple[int, ...]) -> int | None:
    """Count the bytes that one training step keeps for backward, None where the model cannot tell.

    Args:
        model: after `medpeft.apply`.
        batch: images of a step.
        shape: of one, in pixels.
    """
    try:
        costs = medpeft.report(model, example_input=torch.empty(batch, 3, *shape)).costs
    except medpeft.MedpeftError:
        return None
    return getattr(costs, "saved_bytes", None)
