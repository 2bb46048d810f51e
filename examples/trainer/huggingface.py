"""A data set of Hugging Face's `datasets`: from the hub, a folder written by `save_to_disk`, or an image folder."""

from pathlib import Path
from typing import Any

from .errors import TrainerError
from .images import Bytes, Images, as_image, pixels_of
from .naming import PART_NAMES, name_parts, number_classes
from .reading import Reading, load
from .split import join_groups

PREFIX = "hf:"


def read_huggingface(name: str, reading: Reading) -> Images:
    """Read a data set by its name on the hub or its folder, without the prefix.

    The column of images is the one whose feature is an image; the labels stand in `label`, or in the only column of classes.
    Splits named train, validation and test are kept; a single split is split like a folder.

    Raises:
        TrainerError: it cannot be loaded, or has no column of images or labels.
    """
    splits = _splits(name)
    first = next(iter(splits.values()))
    image, label = _columns(name, first.features)
    if reading.group_column and reading.group_column not in first.column_names:
        raise TrainerError(
            f"{name} has the columns {', '.join(first.column_names)}, and no '{reading.group_column}'."
        )
    places = [(key, i) for key, rows in splits.items() for i in range(len(rows))]

    def column(wanted: str) -> list[str]:
        return loaded.of([str(value) for rows in splits.values() for value in rows[wanted]])

    loaded = load(places, lambda place: _decode(splits, place, image, name), reading)
    spelled = getattr(first.features[label], "names", None)
    labels, classes = number_classes([spelled[int(value)] if spelled else value for value in column(label)])
    groups = [loaded.digests]
    if reading.patient_column in first.column_names:
        groups.append(column(reading.patient_column))
    return Images(
        loaded.pixels,
        labels,
        classes,
        join_groups(*groups),
        name_parts(loaded.of([key for key, _ in places]), name) if len(splits) > 1 else None,
        loaded.of([f"{key}/{i}" for key, i in places]),
        column(reading.group_column) if reading.group_column else None,
        loaded.broken,
    )


def _decode(splits: dict[str, Any], place: tuple[str, int], image: str, name: str) -> tuple[Bytes, str]:
    key, i = place
    try:
        return as_image(pixels_of(splits[key][i][image])), ""
    # Damaged files raise whatever their format's parser stumbles on.
    except Exception as error:
        raise TrainerError(f"Image {i} of the split '{key}' of {name} could not be read: {error}.") from error


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
    return {key: rows for key, rows in splits.items() if key.lower() in PART_NAMES} or splits


def _columns(name: str, features: dict[str, Any]) -> tuple[str, str]:
    """Find the column of images and that of labels."""
    images = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
    classes = [column for column, feature in features.items() if type(feature).__name__ == "ClassLabel"]
    labels = ["label"] if "label" in features else classes
    if len(images) != 1 or len(labels) != 1:
        described = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise TrainerError(f"{name} has the columns {described}; one of images is needed, and a 'label'.")
    return images[0], labels[0]
