"""Images with their masks: in folders side by side, by a suffix in the name, or by a column of a table."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ..checks import TABLES
from ..errors import TrainerError
from ..files.images import is_image
from ..files.mask_files import without_suffix
from ..settings import Settings
from .rows import PARTS, Rows, name_parts
from .tables import table_rows

MASK = re.compile(r"(.+?)[ _-]*(mask|seg|segmentation|annotation|label)s?([ _-]*\d+)?", re.IGNORECASE)
# nnU-Net numbers the channels of a case: case_0000, case_0001.
CHANNEL = re.compile(r"(.+)_(\d{4})")
IMAGES = ("images", "image", "imagestr", "img", "imgs")
MASKS = ("masks", "mask", "labels", "label", "labelstr", "segmentations", "annotations", "gt")
FORMS = (
    "Give folders images/ and masks/ (or imagesTr/ and labelsTr/) with files of the same names, masks named "
    "X_mask or X_seg beside each image X, or a .csv with the columns path and mask."
)


def mask_rows(data: str, settings: Settings) -> Rows:
    """List images with their masks, without reading one; `mask` holds the paths of each image's masks.

    Raises:
        TrainerError: there are none, or an image or a mask lacks its partner and is not to be left out.
    """
    path = Path(data)
    if path.is_dir():
        rows = _folder_rows(path)
    elif path.suffix.lower() in TABLES:
        rows = _table_rows(path, settings)
    else:
        raise TrainerError(f"--data {data} has no masks that --task segment could read. {FORMS}")
    lonely = rows.table["mask"].map(len) == 0
    if not len(rows.table) or lonely.all():
        raise TrainerError(f"--data {data} has {len(rows.table)} images, and no mask of one. {FORMS}")
    if lonely.any():
        first = rows.table["name"][lonely].iloc[0]
        text = f"{lonely.sum()} of {len(rows.table)} images have no mask, the first: {first}"
        _refuse_unless(settings, f"{text}. An image without a structure needs an empty mask.")
        rows.notes.append(f"Left out: {text}")
        rows.table = rows.table[~lonely].reset_index(drop=True)
    return rows


def masks_known(data: Path, settings: Settings) -> Rows | None:
    """List the images of a folder or a table with the masks that some of them have; None if none has."""
    if data.is_dir():
        rows = _folder_rows(data)
    else:
        rows = table_rows(data, settings, labelled=False)
        rows.table["mask"] = rows.table.get("mask", pd.Series([None] * len(rows.table))).map(_those_there)
    known = rows.table["mask"].map(len) > 0
    if not known.any():
        return None
    if not known.all():
        rows.notes.append(f"{(~known).sum()} of {len(known)} images have no mask, and are not scored")
    return rows


def _refuse_unless(settings: Settings, text: str) -> None:
    if not settings.skip_broken:
        raise TrainerError(f"{text} Leave them out with --skip-broken.")


def _folder_rows(folder: Path) -> Rows:
    """List a folder, or its folders of training, validation and test."""
    inside = [own for own in sorted(folder.iterdir()) if own.is_dir() and own.name[0] != "."]
    if not inside or not {own.name.lower() for own in inside} <= PARTS.keys():
        return _pairs(folder, folder)
    tables, notes = [], []
    for own in inside:
        rows = _pairs(own, folder)
        rows.table["part"] = name_parts([own.name], folder)[0]
        tables.append(rows.table)
        notes += rows.notes
    return Rows(pd.concat(tables, ignore_index=True), notes)


def _pairs(folder: Path, top: Path) -> Rows:
    """Pair the images below a folder with their masks."""
    image_folder, mask_folder = _named(folder, IMAGES), _named(folder, MASKS)
    if image_folder and mask_folder:
        masks: dict[str, list[Path]] = {}
        for path in _files(mask_folder):
            masks.setdefault(_key(path, mask_folder), []).append(path)
        images = {_key(path, image_folder): path for path in _files(image_folder)}
        return _joined(_without_channels(images, masks), masks, top)
    files = _files(folder)
    there = {_key(path, folder): path for path in files}
    masks, images = {}, {}
    for key, path in there.items():
        owner = _owner(key, there)
        if owner:
            masks.setdefault(owner, []).append(path)
        else:
            images[key] = path
    return _joined(images, masks, top)


def _joined(images: Mapping[str, Path], masks: Mapping[str, Sequence[Path]], top: Path) -> Rows:
    """Make a row of each image; masks may be named as images are, or with `_mask` after it."""
    of_image: dict[str, list[Path]] = {key: [] for key in images}
    unused: list[Path] = []
    for key, paths in masks.items():
        owner = key if key in images else _owner(key, images)
        if owner:
            of_image[owner] += paths
        else:
            unused += paths
    notes = []
    if unused:
        notes.append(f"{len(unused)} masks have no image and are passed over, the first: {min(unused)}")
    rows = []
    for key, path in images.items():
        rows.append((path, path.relative_to(top).as_posix(), sorted(of_image[key])))
    return Rows(pd.DataFrame(rows, columns=["item", "name", "mask"], dtype=object), notes)


def _without_channels(images: Mapping[str, Path], masks: Mapping[str, Any]) -> dict[str, Path]:
    """Take nnU-Net's number of the channel off the names of images; a case of one channel is an image."""
    found: dict[str, Path] = {}
    for key, path in images.items():
        numbered = CHANNEL.fullmatch(key)
        own = key
        if numbered and key not in masks and numbered[1] in masks:
            own = numbered[1]
        if own in found:
            raise TrainerError(
                f"{found[own].name} and {path.name} are channels of one case, and an image of one channel or "
                "of three colours, is needed. Leave one channel of each case in the folder."
            )
        found[own] = path
    return found


def _owner(key: str, images: Mapping[str, Any]) -> str | None:
    """Give the image that a mask's name means: the name before `_mask`."""
    named = MASK.fullmatch(key)
    if named and named[1] in images:
        return named[1]
    return None


def _key(path: Path, folder: Path) -> str:
    """Give a file's path below a folder, without its suffix and in one case."""
    return without_suffix(path.relative_to(folder).as_posix()).casefold()


def _files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name[0] != "."]
    return list(filter(is_image, files))


def _named(folder: Path, names: Sequence[str]) -> Path | None:
    """Find the subfolder of one of some names."""
    there = {own.name.casefold(): own for own in folder.iterdir() if own.is_dir()}
    for name in names:
        if name in there:
            return there[name]
    return None


def _table_rows(file: Path, settings: Settings) -> Rows:
    """Turn the column of masks into the paths of files."""
    rows = table_rows(file, settings, labelled=False)
    if "mask" not in rows.table:
        raise TrainerError(
            f"{file} has no column 'mask'. Name the one of the masks' files with --mask-column."
        )
    named = rows.table["mask"]
    missing = named[~named.map(Path.exists)]
    if len(missing):
        first = missing.iloc[0]
        _refuse_unless(settings, f"{file} names {len(missing)} masks that do not exist, the first: {first}.")
    rows.table["mask"] = named.map(_those_there)
    return rows


def _those_there(path: Path | None) -> list[Path]:
    """Give a mask that a table names, if it does and there is one."""
    if path is None or not path.is_file():
        return []
    return [path]
