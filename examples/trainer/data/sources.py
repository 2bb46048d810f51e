"""Where images come from: a folder, a table, a MedMNIST file, Hugging Face, or one stained tissue section."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..checks import TABLES
from ..errors import TrainerError
from ..files.images import SUFFIXES, is_image
from ..files.mask_files import without_suffix
from ..settings import Settings
from ..tasks import TASKS, Task
from .archives import PREFIX, huggingface_rows, npz_rows
from .brain import brain_rows
from .masks import MASK, mask_rows, masks_known
from .rows import PARTS, Images, Rows, name_parts, read_images
from .tables import table_rows
from .tissue import stain_rows, tissue_rows


def read_data(settings: Settings) -> Images:
    """Read the images of `--data`, and of `--test-data` where the test comes from another site.

    Raises:
        TrainerError: the data cannot be read or hold fewer than two classes.
    """
    rows = rows_of(settings.data, settings)
    if settings.test_data is not None:
        rows = _with_test(rows, rows_of(settings.test_data, settings), TASKS[settings.task])
    return read_images(rows, settings)


def rows_of(data: str | None, settings: Settings) -> Rows:
    """List the images of a source, without reading one."""
    if data is None:
        return default_rows(settings)
    if settings.task == "segment":
        return mask_rows(data, settings)
    if data.startswith(PREFIX):
        return huggingface_rows(data.removeprefix(PREFIX), settings)
    path = Path(data)
    if path.is_dir():
        return folder_rows(path, settings)
    if path.suffix.lower() in TABLES:
        return table_rows(path, settings)
    if path.suffix.lower() == ".npz":
        return npz_rows(path, settings.task)
    raise TrainerError(
        f"--data {path} is a {path.suffix or 'nameless'} file. Give a folder with one subfolder a class, "
        "a .csv with the columns path and label, a MedMNIST .npz, or hf:NAME for a data set of Hugging Face."
    )


def default_rows(settings: Settings) -> Rows:
    """List the images that come with the 'examples' extra."""
    if settings.task != "segment":
        return tissue_rows(settings.task)
    return brain_rows() if settings.volumes else stain_rows()


def rows_to_predict(data: str, settings: Settings, classes: Sequence[str]) -> Rows:
    """List the images of a source for a model of those classes; there are labels where they are known.

    Of a folder the images at any depth; their labels are known where each lies in a folder named as a class.

    Raises:
        TrainerError: there are no images, or they have labels that are no classes.
    """
    path = Path(data)
    if path.is_dir():
        rows = Rows(*_images_below(path, path, settings))
        folders = rows.table["name"].map(
            lambda name: [part for part in name.split("/")[:-1] if part in classes]
        )
        if settings.task == "segment":
            rows = masks_known(path, settings) or rows
        elif folders.map(bool).all():
            rows.table["label"] = folders.map(lambda parts: parts[-1])
    elif path.is_file() and is_image(path):
        rows = Rows(pd.DataFrame({"item": [path], "name": [path.name]}))
    elif path.suffix.lower() in TABLES:
        rows = table_rows(path, settings, labelled=False)
        if settings.task == "segment":
            rows = masks_known(path, settings) or Rows(rows.table.drop(columns="mask", errors="ignore"))
    else:
        rows = rows_of(data, settings)
    if rows.table.empty:
        raise TrainerError(f"{data} has no images. Give a folder with some, at any depth, or a table.")
    return rows


def _with_test(rows: Rows, test: Rows, task: type[Task]) -> Rows:
    """Add the images of another site as the test."""
    classes = sorted(set(task.named(rows.table)))
    new = sorted(set(task.named(test.table)) - set(classes))
    if new:
        raise TrainerError(
            f"--test-data has the class '{new[0]}', and --data only {', '.join(classes)}. "
            "Name the classes alike."
        )
    if "test" in rows.column("part"):
        raise TrainerError("--data has a test part of its own. Leave it out, or --test-data.")
    test.table["part"] = "test"
    rows.table["part"] = rows.column("part") or "train"
    for number, site in enumerate((rows, test), start=1):
        # Patient 7 of one site is not patient 7 of the other.
        names = site.column("patient") or site.column("name")
        site.table["patient"] = [f"site {number} {name}" for name in names]
    notes = rows.notes + [f"--test-data: {note}" for note in test.notes]
    return Rows(pd.concat([rows.table, test.table], ignore_index=True), notes)


def folder_rows(folder: Path, settings: Settings) -> Rows:
    """List `folder/class/image`, or `folder/train/class/image` where the data are split already."""
    inside = class_folders = _subfolders(folder)
    split_already = bool(inside) and {own.name.lower() for own in inside} <= PARTS.keys()
    if split_already:
        class_folders = [own for part in inside for own in _subfolders(part)]
    tables, notes = [], []
    for own in class_folders:
        table, own_notes = _images_below(own, folder, settings)
        table["label"] = own.name
        if split_already:
            table["part"] = name_parts([own.parent.name], folder)[0]
        tables.append(table)
        notes += [f"{own.name}: {note}" for note in own_notes]
    if not any(map(len, tables)):
        raise TrainerError(
            f"--data {folder} has no images in its {len(inside)} subfolders. Put the images of "
            f"each class into a subfolder of its own ({', '.join(sorted(SUFFIXES))}, or DICOM)."
        )
    return Rows(pd.concat(tables, ignore_index=True), notes)


def _images_below(folder: Path, top: Path, settings: Settings) -> tuple[pd.DataFrame, list[str]]:
    """List the images below a folder, hidden ones left out, and say what was passed over.

    With `--volumes`, a folder of several DICOM slices is one image.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    images = list(filter(is_image, files))
    notes = []
    masks = set()
    if not settings.masks:
        masks = _masks(images)
    if masks:
        first = min(masks).name
        notes.append(
            f"{len(masks)} masks beside their images are left out, such as {first} (--masks takes them)"
        )
    others = Counter(path.suffix.lower() or "no suffix" for path in set(files) - set(images))
    if others:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
        notes.append(f"{others.total()} files are no images and are passed over: {kinds}")
    table = pd.DataFrame({"item": sorted(set(images) - masks)}, dtype=object)
    if settings.volumes and len(table):
        several = table["item"].map(lambda path: path.parent).duplicated(keep=False)
        table["item"] = table["item"].where(~several, table["item"].map(lambda path: path.parent))
        table = table.drop_duplicates(ignore_index=True)
    table["name"] = table["item"].map(lambda path: path.relative_to(top).as_posix())
    return table, notes


def _masks(images: Sequence[Path]) -> set[Path]:
    """Find the images that are named as another one beside them with `_mask` added."""
    there = {(path.parent, without_suffix(path.name).casefold()) for path in images}
    masks = set()
    for path in images:
        named = MASK.fullmatch(without_suffix(path.name))
        if named and (path.parent, named[1].casefold()) in there:
            masks.add(path)
    return masks


def _subfolders(folder: Path) -> list[Path]:
    return sorted(own for own in folder.iterdir() if own.is_dir() and own.name[0] != ".")
