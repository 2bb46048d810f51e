"""A CSV that names image files, their labels and, if it has them, patients, parts and subgroups."""

import csv
from pathlib import Path

from .errors import TrainerError
from .images import Images
from .naming import name_parts, number_classes
from .reading import Reading, load_images
from .split import join_groups


def read_csv(file: Path, reading: Reading) -> Images:
    """Read a table with the columns `path` (relative to the table) and `label`.

    A column `split` (train, val, test) fixes the parts. Rows with one patient stay together.
    """
    table = _columns(file)
    patient, group = reading.patient_column, reading.group_column
    needed = ["path", "label", *([patient] if patient != "patient" else []), *([group] if group else [])]
    for column in needed:
        if column not in table:
            raise TrainerError(
                f"{file} has the columns {', '.join(table)}, and no '{column}'. Name the image files in 'path', the classes "
                "in 'label', patients in --patient-column and subgroups in --group-column."
            )
    used = {c: table[c] for c in (*needed, "split", patient) if c in table}
    _check_rows(file, used, reading.skip_broken)
    loaded = load_images([file.parent / path for path in table["path"]], reading)
    kept = {column: loaded.of(values) for column, values in used.items()}
    labels, classes = number_classes(kept["label"])
    keys = [loaded.digests, loaded.patients, *([kept[patient]] if patient in kept else [])]
    return Images(
        loaded.pixels,
        labels,
        classes,
        join_groups(*keys),
        name_parts(kept["split"], file) if "split" in kept else None,
        kept["path"],
        kept[group] if group else None,
        loaded.broken,
    )


def _columns(file: Path) -> dict[str, list[str]]:
    # utf-8-sig: spreadsheets put a mark before the first column's name.
    with file.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        rows = list(reader)
    if not rows:
        raise TrainerError(f"{file} has no rows below its header.")
    return {name: [row[name] or "" for row in rows] for name in reader.fieldnames or ()}


def _check_rows(file: Path, table: dict[str, list[str]], skip_missing: bool) -> None:
    for column, values in table.items():
        empty = [row + 2 for row, value in enumerate(values) if not value.strip()]
        if empty:
            raise TrainerError(
                f"{file} has {len(empty)} rows without a '{column}', the first on line {empty[0]}. "
                "Fill them in, or take the rows or the column out."
            )
    missing = [path for path in table["path"] if not (file.parent / path).is_file()]
    if missing and not skip_missing:
        raise TrainerError(
            f"{file} names {len(missing)} images that do not exist, the first is {missing[0]}. "
            f"Paths are relative to {file.parent.resolve()}."
        )
