"""Where images come from: a folder, a CSV, a MedMNIST file, or one stained tissue section."""

import csv
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from .errors import TrainerError
from .images import SUFFIXES, Images, Integers, digest, load_images, resize, stack, to_uint8
from .split import PARTS, join_groups
from .tissue import tissue_patches

PART_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def read_data(data: Path | None, size: int, patient_column: str = "patient", quiet: bool = False) -> Images:
    """Read a data set.

    Args:
        data: a folder, a `.csv`, a `.npz`, or None for patches of scikit-image's tissue section.
        size: the side in pixels at which images are kept.
        patient_column: the column of a CSV whose rows must stay together.
        quiet: show no progress.

    Raises:
        TrainerError: the data cannot be read or hold fewer than two classes.
    """
    if data is None:
        images = tissue_patches()
    elif data.is_dir():
        images = read_folder(data, size, quiet)
    elif not data.exists():
        raise TrainerError(f"--data {data} does not exist. Give a folder, a .csv or a .npz.")
    elif data.suffix.lower() == ".csv":
        images = read_csv(data, size, patient_column, quiet)
    elif data.suffix.lower() == ".npz":
        images = read_npz(data, size)
    else:
        raise TrainerError(
            f"--data {data} is a {data.suffix or 'nameless'} file. Give a folder with one "
            "subfolder a class, a .csv with the columns path and label, or a MedMNIST .npz."
        )
    if len(images.classes) < 2:
        raise TrainerError(f"--data {data} has only the class '{images.classes[0]}'. At least two are needed.")
    return images


def read_folder(folder: Path, size: int, quiet: bool = False) -> Images:
    """Read `folder/class/image`, or `folder/train/class/image` where the data are split already."""
    inside = _subfolders(folder)
    split_already = bool(inside) and all(f.name.lower() in PART_NAMES for f in inside)
    class_folders = [c for f in inside for c in _subfolders(f)] if split_already else inside
    rows = [(path, f.name, f.parent.name) for f in class_folders for path in _images_in(f)]
    if not rows:
        raise TrainerError(
            f"--data {folder} has no images in its {len(inside)} subfolders. Put the images of "
            f"each class into a subfolder of its own ({', '.join(sorted(SUFFIXES))})."
        )
    paths, names, parents = zip(*rows, strict=True)
    pixels, digests = load_images(paths, size, quiet)
    labels, classes = _number(names)
    parts = _parts(parents, folder) if split_already else None
    relative = [path.relative_to(folder).as_posix() for path in paths]
    return Images(pixels, labels, classes, join_groups(digests), parts, relative)


def read_csv(file: Path, size: int, patient_column: str = "patient", quiet: bool = False) -> Images:
    """Read a table with the columns `path` (relative to the table) and `label`.

    A column `split` (train, val, test) fixes the parts. Rows with one patient stay together.
    """
    table = _columns(file)
    needed = ["path", "label"] + ([patient_column] if patient_column != "patient" else [])
    for column in needed:
        if column not in table:
            raise TrainerError(
                f"{file} has the columns {', '.join(table)}, and no '{column}'. Name the image "
                "files in 'path', the classes in 'label', and patients in --patient-column."
            )
    _check_rows(file, {c: table[c] for c in (*needed, "split", patient_column) if c in table})
    pixels, digests = load_images([file.parent / path for path in table["path"]], size, quiet)
    labels, classes = _number(table["label"])
    keys = [digests, table[patient_column]] if patient_column in table else [digests]
    parts = _parts(table["split"], file) if "split" in table else None
    return Images(pixels, labels, classes, join_groups(*keys), parts, table["path"])


def read_npz(file: Path, size: int) -> Images:
    """Read a MedMNIST file of 2-d images, with the split that it brings.

    Images smaller than `size` are kept as they are and enlarged batch by batch, which saves memory.
    """
    arrays = _npz_arrays(file)
    images = np.concatenate([arrays[f"{part}_images"] for part in PARTS])
    numbers = np.concatenate([arrays[f"{part}_labels"] for part in PARTS])
    if numbers.ndim == 2 and numbers.shape[1] == 1:
        numbers = numbers[:, 0]
    if numbers.ndim != 1:
        raise TrainerError(
            f"{file} has labels of shape {numbers.shape}: several for each image. This trainer takes one class for each image."
        )
    if images.ndim != 3 and not (images.ndim == 4 and images.shape[3] == 3):
        raise TrainerError(
            f"{file} has images of shape {images.shape}; this trainer takes 2-d ones, (N, H, W) or (N, H, W, 3)."
        )
    eight_bit = [to_uint8(image) for image in images]
    pixels = stack([resize(i, size) if max(i.shape[:2]) > size else i for i in eight_bit])
    labels, classes = _number([str(number) for number in numbers])
    parts = np.repeat(PARTS, [len(arrays[f"{part}_labels"]) for part in PARTS])
    return Images(pixels, labels, classes, join_groups([digest(i) for i in eight_bit]), parts)


def _npz_arrays(file: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        with np.load(file) as opened:
            arrays = dict(opened)
    except (OSError, ValueError, BadZipFile) as error:
        raise TrainerError(f"{file} could not be read as a NumPy archive: {error}") from error
    needed = [f"{part}_{kind}" for part in PARTS for kind in ("images", "labels")]
    missing = [name for name in needed if name not in arrays]
    if missing:
        raise TrainerError(
            f"{file} has the arrays {', '.join(arrays)}, and no {', '.join(missing)}. "
            "A MedMNIST file has images and labels for train, val and test."
        )
    return arrays


def _columns(file: Path) -> dict[str, list[str]]:
    # utf-8-sig: spreadsheets put a mark before the first column's name.
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    if not rows:
        raise TrainerError(f"{file} has no rows below its header.")
    return {name: [row[name] or "" for row in rows] for name in reader.fieldnames or ()}


def _check_rows(file: Path, table: dict[str, list[str]]) -> None:
    for column, values in table.items():
        empty = [row + 2 for row, value in enumerate(values) if not value.strip()]
        if empty:
            raise TrainerError(
                f"{file} has {len(empty)} rows without a '{column}', the first on line {empty[0]}. "
                "Fill them in, or take the rows or the column out."
            )
    missing = [path for path in table["path"] if not (file.parent / path).is_file()]
    if missing:
        raise TrainerError(
            f"{file} names {len(missing)} images that do not exist, the first is {missing[0]}. "
            f"Paths are relative to {file.parent.resolve()}."
        )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _images_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))


def _number(names: Sequence[str]) -> tuple[Integers, list[str]]:
    # Classes that are numbers keep their order: 2 before 10.
    numeric = all(name.isdecimal() for name in names)
    classes = sorted(set(names), key=(lambda name: (int(name), name)) if numeric else None)
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[name] for name in names], dtype=np.int64), classes


def _parts(names: Sequence[str], source: Path) -> npt.NDArray[np.str_]:
    unknown = sorted({name for name in names if name.strip().lower() not in PART_NAMES})
    if unknown:
        raise TrainerError(f"{source} has the split '{unknown[0]}'. Use train, val and test.")
    return np.array([PART_NAMES[name.strip().lower()] for name in names])
