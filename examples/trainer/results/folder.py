"""What a run leaves: the adapter, its settings and scores, every prediction, the figures."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from torch import nn

import medpeft

from ..data.batches import Preprocessing
from ..data.rows import Images
from ..data.splits import NAMES, divided_groups
from ..errors import TrainerError
from ..files.images import Integers
from ..judging.scores import without_nan
from ..networks.weights import digest
from ..settings import Settings
from ..tasks import Outcome, Task

FINISHED, SETTINGS = "metrics.json", "settings.yaml"


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
    settings: Settings, task: Task, model: nn.Module, preprocessing: Preprocessing, record: dict[str, Any]
) -> None:
    """Write the adapter with what it takes to use it; called on every process where the model is sharded."""
    metadata = {
        "task": settings.task,
        "model": settings.model,
        "pretrained": not (settings.no_pretrained or settings.weights),
        "model_option": settings.model_option,
        "weights": _identity(settings),
        "seed": settings.seed,
        "classes": record["classes"],
        "details": task.details,
        "preprocessing": preprocessing.to_metadata(),
        "volumes": settings.volumes,
        f"test_{task.score}": record["test"][task.score],
        **record["fitted"],
    }
    medpeft.save(model, Path(str(settings.output)) / "adapter.safetensors", metadata=metadata)


def _identity(settings: Settings) -> dict[str, Any] | None:
    """Say which file the weights came from, for `predict.py`, which needs it again."""
    if settings.weights is None:
        return None
    return {"file": settings.weights.name, "sha256": digest(settings.weights), "head": settings.head}


def write_results(
    settings: Settings, task: Task, names: Sequence[str], outcome: Outcome, record: dict[str, Any]
) -> dict[str, Any]:
    """Write the predictions, the figures and, last of all, the metrics; give these as they are in the file.

    Args:
        settings: of the run.
        task: of the run.
        names: of the N images of the test.
        outcome: of the test.
        record: the metrics.
    """
    folder = Path(str(settings.output))
    predictions = task.predictions(outcome.outputs, outcome.fitted)
    write_predictions(folder / "predictions.csv", names, predictions, task.truths(outcome.targets))
    if not settings.no_figures:
        source, score = Path(settings.data or "default data").stem, record["test"][task.score]
        words = f"{settings.method} on {settings.model}, {source}: test {task.words[task.score]} {score:.3f}"
        task.draw(outcome, record, words, folder)
    record = without_nan(record)
    unfinished = folder / "metrics.unfinished"
    unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(folder / FINISHED)
    # What an interrupted run would go on from.
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def write_predictions(
    path: Path, names: Sequence[str], predictions: pd.DataFrame, truths: pd.DataFrame | None = None
) -> None:
    """Write a CSV with the column `path`, then what is true of each image where it is known, then the rest.

    Args:
        path: the file to write.
        names: of the N images.
        predictions: N rows.
        truths: N rows, None where nothing is known.
    """
    tables = [pd.DataFrame({"path": list(names)}), predictions]
    if truths is not None:
        tables.insert(1, truths)
    pd.concat(tables, axis=1).to_csv(path, index=False)


def describe(counts: dict[str, dict[str, int]], images: Images, found: dict[str, Integers]) -> str:
    """Lay out how many images are in each part, and what there is to know about the data.

    Args:
        counts: for each part, how many images there are of which kind.
        images: the data.
        found: the positions of each part's images.
    """
    table = pd.DataFrame({part: counts[part] for part in NAMES})
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
