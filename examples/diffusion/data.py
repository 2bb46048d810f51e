"""Images with a text each, as data sets of Hugging Face with the columns image, text, label and patient.

They come from a folder, read by `imagefolder`, or are patches of stained tissue graded by their stain.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from PIL.ImageOps import exif_transpose
from sklearn.model_selection import GroupShuffleSplit
from torch import Tensor
from trainer.errors import TrainerError

GRADES = ("no", "weak", "moderate", "strong")
PATCH, STEP, BLOCK = 32, 8, 64  # pixels: patches lie within a block, and overlap there


def read_captioned(data: Path | None, caption: str, patient_column: str = "patient") -> Dataset:
    """Read images with texts.

    Args:
        data: a folder, as `--data` says; its metadata file; or None for tissue patches.
        caption: makes a text of the name of a class, which it takes at `{}`.
        patient_column: the column whose images stay in one part of a split.

    Raises:
        TrainerError: it is no such folder, or a row has no text.
    """
    if data is None:
        return tissue()
    folder = data.parent if data.name in ("metadata.jsonl", "metadata.csv") else data
    source = {"data_dir": str(folder), "data_files": {"train": "**"}, "split": "train"}
    try:
        found = datasets.load_dataset("imagefolder", **source, drop_labels=True)
    # A folder that does not fit raises whatever its reader stumbles on.
    except Exception as error:
        raise TrainerError(
            f"--data {data} cannot be read: {error.__cause__ or error}. Give a folder with metadata.jsonl or "
            "metadata.csv, which have file_name and text, or one with a subfolder of images for each class."
        ) from error
    paths = [Path(image["path"]) for image in found.cast_column("image", Image(decode=False))["image"]]
    for path in paths:
        if not path.is_file():
            raise TrainerError(f"The metadata of {folder} name {path}, which is no file.")
    columns = found.remove_columns("image").to_dict()
    if not columns:
        return _of_folders(paths, folder.resolve(), caption)
    texts = columns.get("text", [None])
    if None in texts:
        raise TrainerError(f"The metadata have {', '.join(columns)}; every row needs a text, in 'text'.")
    others = sorted(columns.keys() - {"text", "label", patient_column})
    if others:
        print(f"Columns that are not read: {', '.join(others)}. Patients: --patient_column", flush=True)
    labels = _filled(columns.get("label"), texts)
    return _dataset(paths, texts, labels, _filled(columns.get(patient_column), paths))


def _filled(values: list[Any] | None, others: list[Any]) -> list[Any]:
    """Put others where there is nothing; a label or patient 0 is something."""
    found = list(values or others)
    for i, value in enumerate(found):
        if value is None or value == "":
            found[i] = others[i]
    return found


def _of_folders(paths: list[Path], folder: Path, caption: str) -> Dataset:
    """Name classes by the folders right below, and leave out masks beside their images."""
    kept, labels, every = [], [], set(paths)
    for path in sorted(paths):
        inside = path.relative_to(folder).parts
        image = path.with_stem(path.stem.partition("_mask")[0])
        if len(inside) > 1 and (image == path or image not in every):
            kept.append(path)
            labels.append(inside[0].replace("_", " "))
    if not kept or "{}" not in caption:
        raise TrainerError(
            f"{folder} has no metadata, so --caption needs a {{}}, and images lie in subfolders."
        )
    if len(kept) < len(paths):
        print(f"{len(paths) - len(kept)} images are left out: masks, or in no subfolder", flush=True)
    return _dataset(kept, [caption.format(label) for label in labels], labels, kept)


def tissue() -> Dataset:
    """Cut scikit-image's 512 × 512 section of human colon into 1,600 patches of 32 × 32, in colour.

    Their text is the grade of the stain (DAB), by its quartiles over the section. Patches overlap only within
    their block of 64 × 64 pixels, which takes the place of a patient.
    """
    from skimage.color import rgb2hed
    from skimage.data import immunohistochemistry

    section = immunohistochemistry()  # type: ignore[no-untyped-call]
    stain = rgb2hed(section)[..., 2]
    starts = [at for at in range(0, len(section), STEP) if at % BLOCK <= BLOCK - PATCH]
    images, amounts, blocks = [], [], []
    for y in starts:
        for x in starts:
            images.append(section[y : y + PATCH, x : x + PATCH])
            amounts.append(stain[y : y + PATCH, x : x + PATCH].mean())
            blocks.append((y // BLOCK, x // BLOCK))
    grades = np.searchsorted(np.quantile(amounts, [0.25, 0.5, 0.75]), amounts)
    labels = [f"{GRADES[grade]} staining" for grade in grades]
    texts = [f"immunohistochemistry of the colon, {label}" for label in labels]
    # By grade, since classes come in the order of the data.
    return _dataset(images, texts, labels, blocks).select(np.argsort(grades, kind="stable"))


def _dataset(images: list[Any], texts: list[Any], labels: list[Any], patients: list[Any]) -> Dataset:
    columns = {"text": texts, "label": labels, "patient": patients}
    rows: dict[str, Any] = {name: list(map(str, values)) for name, values in columns.items()}
    rows["image"] = [str(image) if isinstance(image, Path) else image for image in images]
    features = Features({**dict.fromkeys(columns, Value("string")), "image": Image()})
    return Dataset.from_dict(rows, features)


def of_classes(data: Dataset, classes: Iterable[str]) -> Dataset:
    """Take the images of some classes.

    Raises:
        TrainerError: there is none.
    """
    found = data.select(np.flatnonzero(np.isin(data["label"], list(classes))))
    if not len(found):
        raise TrainerError(f"{', '.join(classes)} has no image in one part of the split. Try another --seed.")
    return found


def within_tokens(data: Dataset, tokenizer: Any, least: int, most: int) -> Dataset:
    """Keep the images whose text has from `least` to `most` tokens, those at its ends included.

    Raises:
        TrainerError: none has.
    """
    lengths = np.array([len(tokens) for tokens in tokenizer(list(data["text"]), truncation=False).input_ids])
    kept = np.flatnonzero((lengths >= least) & (lengths <= most))
    if not len(kept):
        raise TrainerError(
            f"No text has {least} to {most} tokens: they have {lengths.min()} to {lengths.max()}."
        )
    return data.select(kept)


def hold_out(data: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Divide the images into a part to train on and one to compare with; patients stay whole.

    Raises:
        TrainerError: there are fewer than two patients.
    """
    patients = list(data["patient"])
    if len(set(patients)) < 2:
        raise TrainerError(
            f"{len(data)} images of one patient or block cannot be divided. Add images of another."
        )
    splitter = GroupShuffleSplit(1, test_size=share, random_state=seed)
    train, held = next(splitter.split(patients, groups=patients))
    return data.select(train), data.select(held)


def pixels(images: Iterable[Pillow.Image], size: int) -> Tensor:
    """Bring images to (B, 3, size, size), uint8; grey ones get three equal channels."""
    found = []
    for image in images:
        picture = exif_transpose(image)
        if picture.mode.startswith(("I", "F")):
            # Pillow would cut deeper grey off at 255: stretch it from its least to its largest value.
            values = np.nan_to_num(np.asarray(picture, np.float64), posinf=0, neginf=0)
            values = 255 * (values - values.min()) / max(np.ptp(values), 1e-12)
            picture = Pillow.fromarray(values.round().astype(np.uint8))
        picture = picture.convert("RGB").resize((size, size), Pillow.Resampling.BICUBIC)
        found.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))  # (H, W, 3) → (3, H, W)
    return torch.stack(found)


def to_model(images: Tensor) -> Tensor:
    """Scale uint8 pixels to [−1, 1], as autoencoders of diffusers take them."""
    return images.to(torch.float32) / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Scale images in [0, 1], as pipelines give them, to uint8."""
    return (images.detach().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
