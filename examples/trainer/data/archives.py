"""Data sets that bring images and split in a form of their own: MedMNIST, and Hugging Face's `datasets`."""

from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pandas as pd

from ..errors import TrainerError
from ..scripts.files import pixels_of
from ..settings import Settings
from .rows import PARTS, Rows, name_parts

PREFIX = "hf:"


def npz_rows(file: Path, task: str = "classify") -> Rows:
    """List a MedMNIST or MedMNIST+ file (Yang et al. 2023, https://medmnist.com) of images or volumes.

    Raises:
        TrainerError: it is no such file, or has not as many labels for each image as the task takes.
    """
    try:
        with np.load(file) as opened:
            arrays = dict(opened)
    except (OSError, ValueError, BadZipFile) as error:
        raise TrainerError(f"{file} could not be read as a NumPy archive: {error}") from error
    tables = []
    for part in ("train", "val", "test"):
        images, labels = arrays.get(f"{part}_images"), arrays.get(f"{part}_labels")
        if images is None or labels is None:
            raise TrainerError(
                f"{file} has the arrays {', '.join(arrays)}, and no {part}_images or no {part}_labels. "
                "A MedMNIST file has images and labels for train, val and test."
            )
        several = labels.ndim == 2 and labels.shape[1] > 1
        if labels.ndim > 2 or several != (task == "multilabel"):
            raise TrainerError(
                f"{file} has labels of shape {labels.shape}. --task multilabel takes several for each image, "
                "(N, K), and every other task one."
            )
        if images.ndim not in (3, 4):
            raise TrainerError(
                f"{file} has images of shape {images.shape}; "
                "(N, H, W), (N, H, W, 3) or (N, D, H, W) is needed."
            )
        table = pd.DataFrame({"item": list(images), "part": part})
        if several:
            for place in range(labels.shape[1]):
                table[f"label:{place}"] = labels[:, place].astype(str)
        else:
            table["label"] = labels.reshape(-1).astype(str)
        table["name"] = part + "/" + table.index.astype(str)
        tables.append(table)
    return Rows(pd.concat(tables, ignore_index=True))


def huggingface_rows(name: str, settings: Settings) -> Rows:
    """List a data set by its name on the hub or its folder, without the prefix.

    The column of images is the one whose feature is an image; the labels are in `--label-column`, else in
    `label`, else in the only column of classes. Splits named train, validation and test are kept; a single
    split is split like a folder.

    Raises:
        TrainerError: it cannot be loaded, or has no column of images or labels.
    """
    splits = _splits(name)
    first = next(iter(splits.values()))
    for column in (settings.label_column, settings.patient_column, settings.group_column):
        if column and column not in first.column_names:
            raise TrainerError(f"{name} has the columns {', '.join(first.column_names)}, and no '{column}'.")
    image, label = _columns(name, first.features, settings.label_column)
    columns = {"patient": settings.patient_column or "patient", "group": settings.group_column}
    spelled = getattr(first.features[label], "names", None)
    tables = []
    for key, own in splits.items():
        # Decoded later: the whole data set would not lie in memory.
        items = [partial(_decode, own, i, image) for i in range(len(own))]
        table = pd.DataFrame({"item": items, "label": own[label]})
        if spelled:
            table["label"] = table["label"].map(lambda value: spelled[int(value)])
        table["label"] = table["label"].astype(str)
        table["name"] = key + "/" + table.index.astype(str)
        if len(splits) > 1:
            table["part"] = name_parts([key], name)[0]
        for target, column in columns.items():
            if column in first.column_names:
                table[target] = list(map(str, own[column]))
        tables.append(table)
    return Rows(pd.concat(tables, ignore_index=True))


def _decode(rows: Any, place: int, image: str) -> npt.NDArray[np.generic]:
    return pixels_of(rows[place][image])


def _splits(name: str) -> dict[str, Any]:
    """Load the splits that are train, validation or test; all, where none is."""
    try:
        import datasets
    except ImportError as error:
        raise TrainerError(
            f"--data {PREFIX}{name} needs Hugging Face's datasets: pip install datasets."
        ) from error
    folder, read = Path(name), datasets.load_dataset
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        read = datasets.load_from_disk
    try:
        found = read(name)
    # Offline, or of a wrong name, it raises whatever its download library raises.
    except Exception as error:
        problem = [*str(error).splitlines(), type(error).__name__][0]
        raise TrainerError(
            f"--data {PREFIX}{name} could not be loaded: {problem} Give a name on the hub, a folder "
            "written by save_to_disk, or a folder of images."
        ) from error
    if isinstance(found, datasets.Dataset):
        return {"train": found}
    return {key: rows for key, rows in found.items() if key.lower() in PARTS} or dict(found)


def _columns(name: str, features: dict[str, Any], asked: str | None) -> tuple[str, str]:
    """Find the column of images and that of labels."""
    of_type: dict[str, list[str]] = {"Image": [], "ClassLabel": []}
    for column, feature in features.items():
        of_type.setdefault(type(feature).__name__, []).append(column)
    images, labels = of_type["Image"], of_type["ClassLabel"]
    for named in ("label", asked or ""):
        if named in features:
            labels = [named]
    if len(images) != 1 or len(labels) != 1:
        described = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise TrainerError(f"{name} has the columns {described}; one of images is needed, and a 'label'.")
    return images[0], labels[0]
