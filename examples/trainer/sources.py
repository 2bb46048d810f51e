"""Where images come from: a folder, a CSV, a MedMNIST file, Hugging Face, or one stained tissue section."""

from pathlib import Path

from .errors import TrainerError
from .huggingface import PREFIX, read_huggingface
from .images import SUFFIXES, Images
from .medmnist import read_npz
from .naming import PART_NAMES, name_parts, number_classes
from .reading import Reading, load_images
from .split import join_groups
from .tables import read_csv
from .tissue import tissue_patches


def read_data(
    data: Path | str | None,
    size: int,
    patient_column: str = "patient",
    quiet: bool = False,
    *,
    group_column: str | None = None,
    skip_broken: bool = False,
) -> Images:
    """Read a data set.

    Args:
        data: a folder, a `.csv`, a `.npz`, `hf:NAME`, or None for patches of scikit-image's tissue section.
        size: the side in pixels at which images are kept.
        patient_column: the column of a table whose rows must stay together.
        quiet: show no progress.
        group_column: the column of a table that names subgroups of patients.
        skip_broken: leave out images that cannot be read.

    Raises:
        TrainerError: the data cannot be read or hold fewer than two classes.
    """
    reading = Reading(size, patient_column, group_column, skip_broken, quiet)
    tabular = str(data).startswith(PREFIX) or str(data).lower().endswith(".csv")
    if group_column and not tabular:
        raise TrainerError(
            f"--group-column {group_column} names a column, and --data {data} has none. Give a .csv."
        )
    images = tissue_patches() if data is None else _read(data, reading)
    if len(images.classes) < 2:
        raise TrainerError(
            f"--data {data} has only the class '{images.classes[0]}'. At least two are needed."
        )
    return images


def data_source(text: str) -> Path | str:
    """Turn the value of `--data` into a path, unless it names a data set of Hugging Face."""
    return text if text.startswith(PREFIX) else Path(text)


def images_in(folder: Path) -> list[Path]:
    """List the images below a folder, hidden ones left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _read(data: Path | str, reading: Reading) -> Images:
    if isinstance(data, str) and data.startswith(PREFIX):
        return read_huggingface(data.removeprefix(PREFIX), reading)
    path = Path(data)
    if path.is_dir():
        return read_folder(path, reading)
    if not path.exists():
        raise TrainerError(f"--data {path} does not exist. Give a folder, a .csv, a .npz or hf:NAME.")
    readers = {".csv": lambda: read_csv(path, reading), ".npz": lambda: read_npz(path, reading.size)}
    if path.suffix.lower() not in readers:
        raise TrainerError(
            f"--data {path} is a {path.suffix or 'nameless'} file. Give a folder with one subfolder a class, a .csv with the "
            "columns path and label, a MedMNIST .npz, or hf:NAME for a data set of Hugging Face."
        )
    return readers[path.suffix.lower()]()


def read_folder(folder: Path, reading: Reading) -> Images:
    """Read `folder/class/image`, or `folder/train/class/image` where the data are split already."""
    inside = _subfolders(folder)
    split_already = bool(inside) and all(f.name.lower() in PART_NAMES for f in inside)
    class_folders = [c for f in inside for c in _subfolders(f)] if split_already else inside
    rows = [(path, f.name, f.parent.name) for f in class_folders for path in images_in(f)]
    if not rows:
        raise TrainerError(
            f"--data {folder} has no images in its {len(inside)} subfolders. Put the images of "
            f"each class into a subfolder of its own ({', '.join(sorted(SUFFIXES))})."
        )
    paths, names, parents = zip(*rows, strict=True)
    loaded = load_images(paths, reading)
    labels, classes = number_classes(loaded.of(names))
    return Images(
        loaded.pixels,
        labels,
        classes,
        join_groups(loaded.digests, loaded.patients),
        name_parts(loaded.of(parents), folder) if split_already else None,
        loaded.of([path.relative_to(folder).as_posix() for path in paths]),
        broken=loaded.broken,
    )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
