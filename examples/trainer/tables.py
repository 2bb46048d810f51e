"""Tables and folders of images as they are found: with masks, without suffixes, in any encoding."""

import io
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from .archives import PREFIX, huggingface_rows, npz_rows
from .errors import TrainerError
from .images import SUFFIXES, is_image
from .rows import PARTS, Images, Rows, name_parts, read_images
from .settings import TABLES, Settings
from .tissue import tissue_rows

EMPTY = {"", "nan", "na", "n/a", "null"}
# What columns that say whose image it is are called, without case, blanks and underscores.
PATIENTS = {
    "patient",
    "patientid",
    "subject",
    "subjectid",
    "lesion",
    "lesionid",
    "case",
    "caseid",
    "mrn",
    "pid",
}
MASK = re.compile(r"(.+?)[ _-]*(mask|seg|segmentation|annotation)s?([ _-]*\d+)?", re.IGNORECASE)


def read_data(settings: Settings) -> Images:
    """Read the images of `--data`, and of `--test-data` where the test comes from another site.

    Raises:
        TrainerError: the data cannot be read or hold fewer than two classes.
    """
    rows = rows_of(settings.data, settings)
    if settings.test_data is not None:
        rows = _with_test(rows, rows_of(settings.test_data, settings))
    return read_images(rows, settings.image_size, settings.skip_broken)


def rows_of(data: str | None, settings: Settings) -> Rows:
    """List the images of a source, without reading one."""
    if data is None:
        return tissue_rows()
    if data.startswith(PREFIX):
        return huggingface_rows(data.removeprefix(PREFIX), settings)
    path = Path(data)
    if path.is_dir():
        return folder_rows(path, settings)
    if path.suffix.lower() in TABLES:
        return table_rows(path, settings)
    if path.suffix.lower() == ".npz":
        return npz_rows(path)
    raise TrainerError(
        f"--data {path} is a {path.suffix or 'nameless'} file. Give a folder with one subfolder a class, a .csv with "
        "the columns path and label, a MedMNIST .npz, or hf:NAME for a data set of Hugging Face."
    )


def _with_test(rows: Rows, test: Rows) -> Rows:
    """Add the images of another site as the test."""
    new = sorted(set(test.labels) - set(rows.labels))
    if new:
        raise TrainerError(
            f"--test-data has the class '{new[0]}', and --data only {', '.join(sorted(set(rows.labels)))}. "
            "Name the classes alike."
        )
    parts = rows.parts or ["train"] * len(rows.items)
    if "test" in parts:
        raise TrainerError("--data has a test part of its own. Leave it out, or --test-data.")
    patients = [f"site 1 {name}" for name in rows.patients or rows.names]
    others = [f"site 2 {name}" for name in test.patients or test.names]
    return Rows(
        rows.items + test.items,
        rows.names + test.names,
        rows.labels + test.labels,
        parts + ["test"] * len(test.items),
        patients + others,
        rows.groups + test.groups if rows.groups and test.groups else None,
        rows.notes + [f"--test-data: {note}" for note in test.notes],
    )


def folder_rows(folder: Path, settings: Settings) -> Rows:
    """List `folder/class/image`, or `folder/train/class/image` where the data are split already."""
    inside = _subfolders(folder)
    split_already = bool(inside) and all(f.name.lower() in PARTS for f in inside)
    class_folders = [c for f in inside for c in _subfolders(f)] if split_already else inside
    rows = Rows([], [], [], [])
    parts: list[str] = []
    for own in class_folders:
        paths, notes = images_in(own, settings)
        rows.items += paths
        rows.names += [path.relative_to(folder).as_posix() for path in paths]
        rows.labels += [own.name] * len(paths)
        parts += [own.parent.name] * len(paths)
        rows.notes += [f"{own.name}: {note}" for note in notes]
    if not rows.items:
        raise TrainerError(
            f"--data {folder} has no images in its {len(inside)} subfolders. Put the images of "
            f"each class into a subfolder of its own ({', '.join(sorted(SUFFIXES))}, or DICOM)."
        )
    rows.parts = name_parts(parts, folder) if split_already else None
    return rows


def images_in(folder: Path, settings: Settings) -> tuple[list[Path], list[str]]:
    """List the images below a folder, hidden ones left out, and say what was passed over.

    With `--volumes`, a folder whose files are all DICOM slices is one image.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    images = [path for path in files if is_image(path)]
    masks = [] if settings.masks else _masks(images)
    notes = []
    if masks:
        notes.append(
            f"{len(masks)} masks beside their images are left out, such as {masks[0].name} (--masks takes them)"
        )
    others = Counter(path.suffix.lower() or "no suffix" for path in set(files) - set(images))
    if others:
        kinds = ", ".join(f"{number} {kind}" for kind, number in sorted(others.items()))
        notes.append(f"{others.total()} files are no images and are passed over: {kinds}")
    found = sorted(set(images) - set(masks))
    return _series(folder, found) if settings.volumes else found, notes


def _series(folder: Path, files: Sequence[Path]) -> list[Path]:
    """Name the folders of several slices in place of their files."""
    together = Counter(path.parent for path in files)
    return sorted({path.parent if together[path.parent] > 1 else path for path in files} - {folder})


def _masks(images: Sequence[Path]) -> list[Path]:
    """List the images that are named as another one beside them with `_mask` added."""
    there = {(path.parent, path.stem.casefold()) for path in images}
    masks = []
    for path in images:
        named = MASK.fullmatch(path.stem)
        if named and (path.parent, named[1].casefold()) in there:
            masks.append(path)
    return masks


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def rows_to_predict(data: str, settings: Settings, classes: Sequence[str]) -> Rows:
    """List the images of a source for a model of those classes; `labels` is empty where they are not known.

    Of a folder the images at any depth; their labels are known where each lies in a folder named as a class.

    Raises:
        TrainerError: there are no images, or they have labels that are no classes.
    """
    path = Path(data)
    if path.is_dir() or (path.is_file() and is_image(path)):
        top = path if path.is_dir() else path.parent
        paths, notes = images_in(path, settings) if path.is_dir() else ([path], [])
        names = [one.relative_to(top).as_posix() for one in paths]
        labels = []
        for name in names:
            labels += [folder for folder in name.split("/")[:-1] if folder in classes][-1:]
        rows = Rows(paths, names, labels if len(labels) == len(names) else [], notes=notes)
    elif path.suffix.lower() in TABLES:
        rows = table_rows(path, settings, labelled=False)
    else:
        rows = rows_of(data, settings)
    if not rows.items:
        raise TrainerError(f"{data} has no images. Give a folder with some, at any depth, or a table.")
    unknown = sorted(set(rows.labels) - set(classes))
    if unknown:
        raise TrainerError(
            f"{data} has the label '{unknown[0]}', and the adapter the classes {', '.join(classes)}."
        )
    return rows


def table_rows(file: Path, settings: Settings, labelled: bool = True) -> Rows:
    """List the rows of a table with a column of paths (relative to the table) and one of labels.

    A column `split` (train, val, test) fixes the parts. Rows with one patient stay together.

    Args:
        file: the table.
        settings: name its columns.
        labelled: False where the labels may be missing.
    """
    table = read_table(file)
    path = _column(file, table, settings.path_column, "path", "--path-column")
    label = _optional(file, table, settings.label_column, "label", "--label-column")
    if label is None and labelled:
        label = _column(file, table, None, "label", "--label-column")
    patient = _optional(file, table, settings.patient_column, "patient", "--patient-column")
    part = _optional(file, table, None, "split", "")
    group = _optional(file, table, settings.group_column, None, "--group-column")
    used = [name for name in (path, label, patient, part, group) if name is not None]
    _check_rows(file, table, used)
    items = [_existing(file.parent, name) for name in table[path]]
    missing = [name for name, item in zip(table[path], items, strict=True) if not item.exists()]
    if missing and not settings.skip_broken:
        raise TrainerError(
            f"{file} names {len(missing)} images that do not exist, the first is {missing[0]}. "
            f"Paths are relative to {file.parent.resolve()}."
        )
    notes = []
    if patient is None:
        alike = [name for name in table if _plain(name) in PATIENTS]
        hint = f" '{alike[0]}' looks like one: --patient-column '{alike[0]}'." if alike else ""
        notes.append(f"Split image by image, as no column of patients is named.{hint}")
    return Rows(
        items,
        table[path].tolist(),
        table[label].tolist() if label else [],
        name_parts(table[part].tolist(), file) if part else None,
        table[patient].tolist() if patient else None,
        table[group].tolist() if group else None,
        notes,
    )


def read_table(file: Path) -> pd.DataFrame:
    """Read a table as text, whatever its encoding (UTF-8, UTF-16, cp1252) and its separator.

    Raises:
        TrainerError: it has no rows, or rows of several lengths.
    """
    content = file.read_bytes()
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = content.decode("utf-16")
    else:
        try:
            # A spreadsheet puts a mark before the first column's name.
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
    header = text.lstrip().partition("\n")[0]
    separator = max((",", ";", "\t", "|"), key=header.count)
    try:
        table = pd.read_csv(
            io.StringIO(text),
            sep=separator,
            dtype=str,
            keep_default_na=False,
            skipinitialspace=True,
            index_col=False,
        )
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise TrainerError(f"{file} could not be read as a table: {error}") from error
    if table.empty:
        raise TrainerError(f"{file} has no rows below its header.")
    table.columns = [str(name).strip() for name in table.columns]
    return table.apply(lambda column: column.fillna("").str.strip())


def _optional(file: Path, table: pd.DataFrame, asked: str | None, usual: str | None, by: str) -> str | None:
    """Find a column that may be missing unless it is asked for."""
    if asked is None and usual not in {name.lower() for name in table}:
        return None
    return _column(file, table, asked, usual or "", by)


def _column(file: Path, table: pd.DataFrame, asked: str | None, usual: str, by: str) -> str:
    """Find a column by its name, in capitals or not."""
    wanted = asked or usual
    same = [str(name) for name in table if name == wanted]
    alike = [str(name) for name in table if str(name).lower() == wanted.lower()]
    if len(same or alike) != 1:
        raise TrainerError(
            f"{file} has the columns {', '.join(table)}, and no '{wanted}'. Name it with {by}: the image files "
            "are in --path-column, the classes in --label-column, patients in --patient-column and subgroups in "
            "--group-column."
        )
    return (same or alike)[0]


def _check_rows(file: Path, table: pd.DataFrame, columns: Sequence[str]) -> None:
    for column in columns:
        empty = table.index[table[column].str.lower().isin(EMPTY)]
        if len(empty):
            raise TrainerError(
                f"{file} has {len(empty)} rows without a '{column}', the first on line {empty[0] + 2}. "
                "Fill them in, or take the rows or the column out."
            )


def _existing(folder: Path, name: str) -> Path:
    """Give the file that a table means: as it is named, with the slashes of another system, or a suffix added."""
    for path in (folder / name, folder / name.replace("\\", "/")):
        if path.exists():
            return path
        for suffix in sorted(SUFFIXES | {".nii.gz"}):
            for written in (suffix, suffix.upper()):
                if path.with_name(path.name + written).exists():
                    return path.with_name(path.name + written)
    return folder / name


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
