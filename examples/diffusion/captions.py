"""Images with a text each: from a table, from folders named by class, or patches of stained tissue graded by their stain."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from trainer.errors import TrainerError
from trainer.images import SUFFIXES, Integers, read_image, resize, stack
from trainer.split import join_groups
from trainer.tissue import BLOCK, PATCH, patch_corners

NAMES = ("file_name", "file", "path", "image")
GRADES = ("no", "weak", "moderate", "strong")
STEP = 8  # pixels between tissue patches, which overlap within their block


@dataclass
class Captioned:
    """Images and their texts.

    Attributes:
        images: files, or pixels (N, 3, size, size), uint8, kept in memory.
        texts: (N,), what each image shows.
        classes: (N,), a label, or the text itself where the data have none.
        groups: (N,), images with one number never fall into different parts of a split.
        size: the side in pixels at which files are read.
    """

    images: list[Path] | Tensor
    texts: list[str]
    classes: list[str]
    groups: Integers
    size: int

    def __len__(self) -> int:
        return len(self.texts)

    def pixels(self, rows: Iterable[int]) -> Tensor:
        """Read images as (B, 3, size, size), uint8; grey ones get three equal channels."""
        if isinstance(self.images, Tensor):
            return self.images[list(rows)]
        return stack([_rgb(resize(read_image(self.images[i]), self.size)) for i in rows])

    def part(self, rows: Sequence[int] | Integers) -> "Captioned":
        """Take some of the images, in this order."""
        places = [int(i) for i in rows]
        images = self.images[places] if isinstance(self.images, Tensor) else [self.images[i] for i in places]
        texts, classes = [self.texts[i] for i in places], [self.classes[i] for i in places]
        return Captioned(images, texts, classes, self.groups[places], self.size)

    def of(self, classes: Iterable[str]) -> "Captioned":
        """Take the images of some classes."""
        wanted = set(classes)
        return self.part([i for i, name in enumerate(self.classes) if name in wanted])

    def prompts(self, count: int) -> list[str]:
        """Give the first text of each class, at most `count` of them."""
        first: dict[str, str] = {}
        for name, text in zip(self.classes, self.texts, strict=True):
            first.setdefault(name, text)
        return list(dict.fromkeys(first[name] for name in sorted(first, key=_grade)))[:count]


def read_captioned(data: Path | None, size: int, caption: str, patient_column: str = "patient") -> Captioned:
    """Read images with texts.

    Args:
        data: a `.csv` or `.jsonl` table with a column of files (relative to it) and a column `text`, perhaps `label` and
            patients; a folder that holds `metadata.csv` or `metadata.jsonl`; a folder with one subfolder a class; or None for
            tissue patches.
        size: the side in pixels.
        caption: makes a text of the name of a class, which it takes at `{}`.
        patient_column: the column whose images stay in one part of a split.

    Raises:
        TrainerError: there is no such file, column or image.
    """
    if data is None:
        return tissue(size)
    if not data.exists():
        raise TrainerError(f"--data {data} does not exist. Give a folder, a .csv or a .jsonl.")
    if data.is_file():
        return _from_table(data, size, patient_column)
    tables = [data / name for name in ("metadata.jsonl", "metadata.csv") if (data / name).is_file()]
    return _from_table(tables[0], size, patient_column) if tables else _from_folders(data, size, caption)


def tissue(size: int) -> Captioned:
    """Cut scikit-image's 512 × 512 section of human colon into 1,600 patches of 32 × 32, in colour.

    Their text is the grade of the stain (DAB), by its quartiles over the section. Patches overlap only within their block of
    64 × 64 pixels, which is their group.
    """
    from skimage.color import rgb2hed
    from skimage.data import immunohistochemistry

    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    stain = rgb2hed(section)[..., 2]
    corners = patch_corners(section.shape[0], STEP)
    patches = [np.s_[y : y + PATCH, x : x + PATCH] for y, x in corners]
    amounts = np.array([stain[patch].mean() for patch in patches])
    grades = np.searchsorted(np.quantile(amounts, [0.25, 0.5, 0.75]), amounts)
    pixels = stack([resize(section[patch], size) for patch in patches])
    classes = [f"{GRADES[g]} staining" for g in grades]
    texts = [f"immunohistochemistry of the colon, {name}" for name in classes]
    return Captioned(
        pixels, texts, classes, join_groups([(y // BLOCK, x // BLOCK) for y, x in corners]), size
    )


def within_tokens(data: Captioned, tokenizer: Any, least: int, most: int) -> Captioned:
    """Keep the images whose text has from `least` to `most` tokens, those at its ends included.

    The study keeps reports of 7 to 77 tokens, 77 being what CLIP's text encoder reads (Dutt et al., arXiv 2305.08252).

    Raises:
        TrainerError: none has.
    """
    lengths = {text: len(tokenizer(text, truncation=False).input_ids) for text in set(data.texts)}
    kept = [i for i, text in enumerate(data.texts) if least <= lengths[text] <= most]
    if not kept:
        raise TrainerError(
            f"No text has {least} to {most} tokens: they have {min(lengths.values())} to {max(lengths.values())}."
        )
    return data.part(kept)


def hold_out(data: Captioned, share: float, seed: int) -> tuple[Captioned, Captioned]:
    """Divide the images into a part to train on and one to compare with; groups stay whole.

    Raises:
        TrainerError: there are fewer than two groups.
    """
    if len(set(data.groups.tolist())) < 2:
        raise TrainerError(
            f"{len(data)} images of one patient or block cannot be divided. Add images of another."
        )
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    train, held = next(splitter.split(data.texts, groups=data.groups))
    return data.part(train), data.part(held)


def halves(data: Captioned) -> tuple[list[str], list[str]]:
    """Divide the classes into those to pretrain on and new ones.

    Raises:
        TrainerError: there is only one.
    """
    names = sorted(set(data.classes), key=_grade)
    if len(names) < 2:
        raise TrainerError(
            f"The data have only the class '{names[0]}'; the tiny pipeline needs one to begin with and a new one."
        )
    return names[: (len(names) + 1) // 2], names[(len(names) + 1) // 2 :]


def _grade(name: str) -> tuple[int, str]:
    """Grades of a stain in their order, all else by name."""
    known = name.split(" ")[0]
    return (GRADES.index(known) if known in GRADES else 0, name)


def _from_table(file: Path, size: int, patient_column: str) -> Captioned:
    rows = _rows(file)
    names = list(dict.fromkeys(key for row in rows for key in row))
    files = next((name for name in NAMES if name in names), None)
    if files is None or "text" not in names:
        raise TrainerError(
            f"{file} has {', '.join(names) or 'nothing'}. Name the image files in one of {', '.join(NAMES)}, and what they "
            "show in 'text'."
        )
    empty = [i + 1 for i, row in enumerate(rows) if not (row.get(files) and row.get("text"))]
    if empty:
        raise TrainerError(
            f"{file} has {len(empty)} rows without a file or a text, the first is row {empty[0]}."
        )
    images = [file.parent / row[files] for row in rows]
    missing = [path for path in images if not path.is_file()]
    if missing:
        raise TrainerError(
            f"{file} names {len(missing)} images that do not exist, the first is {missing[0]}."
        )
    texts = [row["text"] for row in rows]
    classes = [row.get("label") or row["text"] for row in rows]
    patients = [row.get(patient_column) or f"image {i}" for i, row in enumerate(rows)]
    return Captioned(images, texts, classes, join_groups(patients), size)


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        # utf-8-sig: spreadsheets put a mark before the first column's name.
        with file.open(newline="", encoding="utf-8-sig") as opened:
            if file.suffix.lower() == ".csv":
                return list(csv.DictReader(opened))
            lines = [json.loads(line) for line in opened if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise TrainerError(
            f"{file} cannot be read as a table: {error}. Give a .csv, or a .jsonl with one object a line."
        ) from error
    if not all(isinstance(line, dict) for line in lines):
        raise TrainerError(
            f"{file} has a line that is no JSON object. Write one with the file and the text on each line."
        )
    return [{key: str(value) for key, value in line.items() if value is not None} for line in lines]


def _from_folders(folder: Path, size: int, caption: str) -> Captioned:
    if "{}" not in caption:
        raise TrainerError(f"--caption '{caption}' has no {{}} where the name of the class goes.")
    found = [
        (path, inside.name)
        for inside in sorted(folder.iterdir())
        if inside.is_dir() and not inside.name.startswith(".")
        for path in sorted(inside.rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not found:
        raise TrainerError(
            f"--data {folder} has neither metadata.jsonl, nor metadata.csv, nor images in subfolders."
        )
    names = [name.replace("_", " ") for _, name in found]
    texts = [caption.format(name) for name in names]
    return Captioned([path for path, _ in found], texts, names, np.arange(len(found)), size)


def _rgb(array: Any) -> Any:
    return array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2)


def to_model(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels to [−1, 1], as autoencoders of diffusers take them."""
    return pixels.to(torch.float32) / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Scale images in [0, 1], as pipelines give them, to uint8."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
