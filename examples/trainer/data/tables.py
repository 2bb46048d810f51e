"""Tables of images as they are found: in any encoding, with any separator, without suffixes."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from ..errors import TrainerError
from ..files.images import SUFFIXES
from ..settings import Settings
from .rows import Rows, name_parts

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


def table_rows(file: Path, settings: Settings, labelled: bool = True) -> Rows:
    """List the rows of a table with a column of paths (relative to the table) and one of labels.

    A column `split` (train, val, test) fixes the parts. Rows with one patient stay together.

    Args:
        file: the table.
        settings: name its columns.
        labelled: False where the labels may be missing.
    """
    table = read_table(file)
    rows = _rows_of_columns(file, table, settings, labelled)
    rows["item"] = rows["name"].map(lambda name: _existing(file.parent, name))
    if "mask" in rows:
        rows["mask"] = rows["mask"].map(lambda name: _existing(file.parent, name))
    missing = rows["name"][~rows["item"].map(Path.exists)]
    if len(missing) and not settings.skip_broken:
        raise TrainerError(
            f"{file} names {len(missing)} images that do not exist, the first is {missing.iloc[0]}. "
            f"Paths are relative to {file.parent.resolve()}."
        )
    if "part" in rows:
        rows["part"] = name_parts(rows["part"].tolist(), file)
    notes = []
    if "patient" not in rows:
        notes.append("Split image by image, as no column of patients is named.")
        for name in table:
            if _plain(name) in PATIENTS:
                notes[0] += f" '{name}' looks like one: --patient-column '{name}'."
    return Rows(rows, notes)


def _rows_of_columns(file: Path, table: pd.DataFrame, settings: Settings, labelled: bool) -> pd.DataFrame:
    """Take over the columns that say something of an image, under the names of `Rows.table`."""
    # Cells of findings may be empty: what that means is a setting.
    findings = settings.task == "multilabel"
    needs_label = labelled and not settings.finding_column
    masks = "mask" if settings.task == "segment" else None
    found = {
        "name": _column(file, table, settings.path_column, "path", "--path-column"),
        "label": _column(file, table, settings.label_column, "label", "--label-column", needs_label),
        "patient": _column(file, table, settings.patient_column, "patient", "--patient-column", False),
        "part": _column(file, table, None, "split", "", False),
        "group": _column(file, table, settings.group_column, None, "--group-column", False),
        "mask": _column(file, table, settings.mask_column, masks, "--mask-column", False),
    }
    rows = pd.DataFrame(index=table.index)
    for name, column in found.items():
        if column is None:
            continue
        if not (findings and name == "label"):
            _check_filled(file, table, column)
        rows[name] = table[column]
    for wanted in settings.finding_column:
        rows[f"label:{wanted}"] = table[_column(file, table, wanted, None, "--finding-column")]
    return rows


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
    table.columns = table.columns.astype(str).str.strip()
    return table.apply(lambda column: column.fillna("").str.strip())


def _column(
    file: Path, table: pd.DataFrame, asked: str | None, usual: str | None, by: str, needed: bool = True
) -> str | None:
    """Find a column by its name, in capitals or not; what was neither asked for nor needed may be missing."""
    wanted = asked or usual or ""
    if wanted in table:
        return wanted
    alike = [str(name) for name in table if str(name).lower() == wanted.lower()]
    if len(alike) == 1:
        return alike[0]
    if asked is None and not needed:
        return None
    raise TrainerError(
        f"{file} has the columns {', '.join(table)}, and no '{wanted}'. Name it with {by}: the image files "
        "are in --path-column, the classes in --label-column, patients in --patient-column and subgroups in "
        "--group-column."
    )


def _check_filled(file: Path, table: pd.DataFrame, column: str) -> None:
    empty = table.index[table[column].str.lower().isin(EMPTY)]
    if len(empty):
        raise TrainerError(
            f"{file} has {len(empty)} rows without a '{column}', the first on line {empty[0] + 2}. "
            "Fill them in, or take the rows or the column out."
        )


def _existing(folder: Path, name: str) -> Path:
    """Give the file that a table means: as named, with the slashes of another system, or a suffix added."""
    suffixes: Sequence[str] = ["", *sorted(SUFFIXES), ".nii.gz"]
    for path in (folder / name, folder / name.replace("\\", "/")):
        for suffix in suffixes:
            for written in (suffix, suffix.upper()):
                if path.with_name(path.name + written).exists():
                    return path.with_name(path.name + written)
    return folder / name


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace(" ", "").replace("-", "")
