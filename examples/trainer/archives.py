"""Data sets that bring images and split in a form of their own: MedMNIST, and Hugging Face's `datasets`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from .errors import TrainerError
from .images import pixels_of
from .rows import PARTS, Rows, name_parts
from .settings import Settings

PREFIX = "hf:"


def npz_rows(file: Path) -> Rows:
    """List a MedMNIST or MedMNIST+ file (Yang et al. 2023, https://medmnist.com) of images or volumes.

    Raises:
        TrainerError: it is no such file, or has several labels for each image.
    """
    arrays = _npz_arrays(file)
    rows = Rows([], [], [], [])
    assert rows.parts is not None
    for part in ("train", "val", "test"):
        numbers, images = arrays[f"{part}_labels"], arrays[f"{part}_images"]
        if numbers.ndim == 2 and numbers.shape[1] == 1:
            numbers = numbers[:, 0]
        if numbers.ndim != 1:
            raise TrainerError(
                f"{file} has labels of shape {numbers.shape}: several for each image. This trainer takes one class "
                "for each image."
            )
        if images.ndim not in (3, 4):
            raise TrainerError(
                f"{file} has images of shape {images.shape}; (N, H, W), (N, H, W, 3) or (N, D, H, W) is needed."
            )
        rows.items += list(images)
        rows.labels += numbers.astype(str).tolist()
        rows.names += [f"{part}/{i}" for i in range(len(numbers))]
        rows.parts += [part] * len(numbers)
    return rows


def _npz_arrays(file: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(file) as opened:
            arrays = dict(opened)
    except (OSError, ValueError, BadZipFile) as error:
        raise TrainerError(f"{file} could not be read as a NumPy archive: {error}") from error
    needed = [f"{part}_{kind}" for part in ("train", "val", "test") for kind in ("images", "labels")]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise TrainerError(
            f"{file} has the arrays {', '.join(arrays)}, and no {', '.join(missing)}. "
            "A MedMNIST file has images and labels for train, val and test."
        )
    return arrays


def huggingface_rows(name: str, settings: Settings) -> Rows:
    """List a data set by its name on the hub or its folder, without the prefix.

    The column of images is the one whose feature is an image; the labels are in `--label-column`, else in `label`,
    else in the only column of classes. Splits named train, validation and test are kept; a single split is split
    like a folder.

    Raises:
        TrainerError: it cannot be loaded, or has no column of images or labels.
    """
    splits = _splits(name)
    first = next(iter(splits.values()))
    image, label = _columns(name, first.features, settings.label_column)
    for column in (settings.patient_column, settings.group_column):
        if column and column not in first.column_names:
            raise TrainerError(f"{name} has the columns {', '.join(first.column_names)}, and no '{column}'.")
    patient = settings.patient_column or "patient"
    spelled = getattr(first.features[label], "names", None)
    rows = Rows([], [], [])
    parts: list[str] = []
    patients: list[str] = []
    groups: list[str] = []
    for key, own in splits.items():
        rows.items += [_reader(own, i, image) for i in range(len(own))]
        rows.names += [f"{key}/{i}" for i in range(len(own))]
        rows.labels += [spelled[int(value)] if spelled else str(value) for value in own[label]]
        parts += [key] * len(own)
        patients += map(str, own[patient]) if patient in first.column_names else []
        groups += map(str, own[settings.group_column]) if settings.group_column else []
    rows.parts = name_parts(parts, name) if len(splits) > 1 else None
    rows.patients, rows.groups = patients or None, groups or None
    return rows


def _reader(rows: Any, place: int, image: str) -> Callable[[], npt.NDArray[np.generic]]:
    """Decode later: the whole data set would not lie in memory."""
    return lambda: pixels_of(rows[place][image])


def _splits(name: str) -> dict[str, Any]:
    """Load the splits that are train, validation or test; all, where none is."""
    try:
        import datasets
    except ImportError as error:
        raise TrainerError(
            f"--data {PREFIX}{name} needs Hugging Face's datasets: pip install datasets."
        ) from error
    folder = Path(name)
    saved = (folder / "dataset_dict.json").exists() or (folder / "state.json").exists()
    try:
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    # Offline, or of a wrong name, it raises whatever its download library raises.
    except Exception as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TrainerError(
            f"--data {PREFIX}{name} could not be loaded: {problem} Give a name on the hub, a folder written by "
            "save_to_disk, or a folder of images."
        ) from error
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    return {key: rows for key, rows in splits.items() if key.lower() in PARTS} or splits


def _columns(name: str, features: dict[str, Any], asked: str | None) -> tuple[str, str]:
    """Find the column of images and that of labels."""
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    classes = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    labels = [asked] if asked in features else classes
    if asked is None and "label" in features:
        labels = ["label"]
    if len(images) != 1 or len(labels) != 1:
        described = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise TrainerError(f"{name} has the columns {described}; one of images is needed, and a 'label'.")
    return images[0], labels[0]
