"""How well a mask fits: Dice, distances of surfaces, and sizes, for each image and each structure."""

import math
import warnings
from collections.abc import Sequence

import torch
from monai.losses.dice import DiceCELoss
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.meandice import compute_dice
from monai.metrics.surface_dice import compute_surface_dice
from torch import Tensor
from torch.nn.functional import one_hot

from ..files.structures import UNKNOWN

# What is kept of each image and structure; the loss is the whole image's.
KEPT = ("dice", "hd95", "surface_dice", "size", "loss")
TOLERANCE = 1.0  # pixels or mm


def dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Give the loss (Dice of the structures + cross entropy of all, Isensee et al. 2021).

    Args:
        logits: (B, S + 1, …), of the background and the structures.
        labels: (B, …), 0 for the background.
    """
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    found: Tensor = loss(logits.float(), labels[:, None])
    return found


def measure(logits: Tensor, labels: Tensor, sides: Tensor, surfaces: bool) -> tuple[Tensor, Tensor]:
    """Reduce logits and labels to what the scores need.

    Args:
        logits: (B, S + 1, …).
        labels: (B, …), `UNKNOWN` everywhere where they are not known.
        sides: (B, 2) or (B, 3), of a pixel or voxel.
        surfaces: whether distances of surfaces are wanted, which take time.

    Returns:
        (B, S, 5) of `KEPT`, NaN where one is not defined or wanted; (B, S) the true sizes, NaN if not known.
    """
    structures = logits.shape[1] - 1
    predicted = _planes(logits.argmax(1), structures)
    area = sides.prod(1, keepdim=True)
    kept = torch.full((len(logits), structures, len(KEPT)), math.nan)
    kept[..., KEPT.index("size")] = predicted.flatten(2).sum(2) * area
    known = (labels != UNKNOWN).flatten(1).any(1).tolist()
    truth = _planes(labels.where(labels != UNKNOWN, 0), structures)
    sizes = truth.flatten(2).sum(2) * area
    dice = compute_dice(predicted, truth, include_background=True)
    for place in range(len(logits)):
        if not known[place]:
            sizes[place] = math.nan
            continue
        kept[place, :, KEPT.index("dice")] = dice[place]
        one = slice(place, place + 1)
        kept[place, :, KEPT.index("loss")] = dice_ce(logits[one], labels[one]).item()
        if surfaces:
            hd95, surface_dice = distances(predicted[one], truth[one], sides[place].tolist())
            kept[place, :, KEPT.index("hd95")] = hd95
            kept[place, :, KEPT.index("surface_dice")] = surface_dice
    return kept, sizes


def distances(predicted: Tensor, truth: Tensor, sides: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Give the 95th percentile of the Hausdorff distance and the surface Dice of one image's structures.

    A distance below one pixel of the grid cannot be measured, so the tolerance is never smaller.

    Args:
        predicted: (1, S, …), 0 or 1.
        truth: likewise.
        sides: of a pixel or voxel.

    Returns:
        (S,) and (S,): NaN for a structure that is not there; one that was missed has no distance, and 0.
    """
    count = predicted.shape[1]
    there, missed = truth.flatten(2).any(2)[0], ~predicted.flatten(2).any(2)[0]
    tolerances = [max(TOLERANCE, *sides)] * count
    with warnings.catch_warnings():
        # A structure that is empty in one of both is told of here.
        warnings.simplefilter("ignore")
        hd95 = compute_hausdorff_distance(
            predicted, truth, include_background=True, percentile=95, spacing=list(sides)
        )[0]
        surface = compute_surface_dice(
            predicted, truth, tolerances, include_background=True, spacing=list(sides)
        )[0]
    nothing = torch.tensor(math.nan)
    hd95 = hd95.float().where(there & ~missed, nothing)
    surface = surface.float().where(~missed, torch.tensor(0.0)).where(there, nothing)
    return hd95, surface


def _planes(labels: Tensor, structures: int) -> Tensor:
    """Give a plane for each structure, on the CPU."""
    # (B, …) → (B, …, S + 1) → (B, S, …)
    return one_hot(labels.cpu().long(), structures + 1).movedim(-1, 1)[:, 1:].float()
