"""The structures of a set of masks: their values, the images in which they are, how large a pixel is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from ..errors import TrainerError
from .mask_files import sides_of

UNKNOWN = 255  # in the whole mask of an image whose truth is not known


@dataclass
class Masks:
    """The masks of N images.

    Attributes:
        labels: (N, …), uint8: 0 for the background, 1, 2, … for the structures, 255 everywhere in the mask of
            an image whose truth is not known.
        sides: (N, 2) or (N, 3), of one of its pixels or voxels, in mm or in pixels of the file.
    """

    labels: Tensor
    sides: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: Any) -> tuple[Tensor, Tensor]:
        """Give labels and sides of one or several."""
        return self.labels[chosen], self.sides[chosen]


def structures_of(found: Sequence[Sequence[int]], named: Sequence[str]) -> list[int]:
    """Give the values of the structures of a set, in order.

    Raises:
        TrainerError: there are none, too many for the names, or 255 stands beside others.
    """
    values = sorted(set().union(*found) - {0})
    if not values:
        raise TrainerError("Every mask is empty: there is no value above 0 in any of them.")
    if named and len(named) != len(values):
        raise TrainerError(
            f"--structure names {len(named)} structures ({', '.join(named)}), and the masks have the values "
            f"{', '.join(map(str, values))}. Name them in this order."
        )
    if len(values) >= UNKNOWN:
        raise TrainerError(f"The masks have {len(values)} different values. At most {UNKNOWN - 1} are taken.")
    if 255 in values and len(values) > 1 and not named:
        raise TrainerError(
            f"The masks have the values {', '.join(map(str, values))}. Is 255 a structure of its own, the "
            "same as 1, or what is to be ignored? Write masks of one structure alike, or name each value by "
            "--structure."
        )
    return values


def default_names(values: Sequence[int]) -> list[str]:
    """Name structures by their values; a single one is the foreground."""
    if len(values) == 1:
        return ["foreground"]
    return [str(value) for value in values]


def numbered(masks: Tensor, values: Sequence[int]) -> Tensor:
    """Turn the values of structures into 1, 2, …, in 8 bit."""
    places = torch.searchsorted(torch.tensor([0, *values]), masks.long().contiguous())
    return places.to(torch.uint8)


def presence(labels: Tensor, structures: int) -> npt.NDArray[np.bool_]:
    """Say which structures (N, S) are in masks (N, …)."""
    found = np.zeros((len(labels), structures), dtype=np.bool_)
    for place, mask in enumerate(labels):
        counts = torch.bincount(mask.flatten().int(), minlength=structures + 1)
        found[place] = counts[1 : structures + 1].numpy() > 0
    return found


def sides_in(rows: pd.DataFrame, stored: Sequence[int], unit: str = "") -> tuple[Tensor, str]:
    """Give the sides (N, 2) or (N, 3) of stored pixels, in mm if every file tells them, else in file pixels.

    Raises:
        TrainerError: mm are asked for, and a file does not tell them.
    """
    told = [sides_of(item) for item in rows["item"]]
    unknown = [name for name, sides in zip(rows["name"], told, strict=True) if sides is None]
    if unknown and unit == "mm":
        raise TrainerError(
            f"{unknown[0]} does not say how large its pixels are, as the training's files did."
        )
    unit = unit or ("px" if unknown else "mm")
    found = []
    for sides, shape in zip(told, rows["shape"], strict=True):
        own = torch.ones(len(stored))
        if unit == "mm" and sides is not None:
            own = torch.tensor(sides[-len(stored) :])
        found.append(own * torch.tensor(shape) / torch.tensor(stored))
    return torch.stack(found), unit


def notes_on(present: Any, found: Sequence[Sequence[int]], shape: Sequence[int]) -> list[str]:
    """Tell of empty masks, and of structures that are too small for the size that is kept."""
    notes = []
    empty = sum(set(values) <= {0} for values in found)
    if empty:
        notes.append(f"{empty} masks are empty: their images have no structure")
    whole = sum(len(set(values) - {0}) for values in found)
    lost = whole - int(present.sum())
    if lost:
        notes.append(
            f"{lost} of {whole} structures in images vanish at {' × '.join(map(str, shape))}: take a larger "
            "--image-size"
        )
    return notes
