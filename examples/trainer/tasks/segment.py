"""Which pixels or voxels belong to which structure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from monai.inferers.utils import sliding_window_inference
from torch import Tensor, nn

from ..errors import TrainerError
from ..files.images import complaint
from ..files.mask_files import load_masks, mask_type, without_suffix, write_mask
from ..files.structures import (
    UNKNOWN,
    Masks,
    default_names,
    notes_on,
    numbered,
    presence,
    sides_in,
    structures_of,
)
from ..judging.overlap import KEPT, dice_ce, measure
from ..pictures.overlays import Example, draw_learning, draw_overlays, fullest_slice
from ..scripts.pixels import on_grid
from ..settings import Settings
from .outcome import Outcome, Targets
from .task import Task

PLACES = {name: place for place, name in enumerate(KEPT)}
# How a window slides over an image that is larger; so many windows are computed at once.
SLIDING: dict[str, Any] = {"sw_batch_size": 4, "overlap": 0.5, "mode": "gaussian"}


class Segment(Task):
    """Which structure each pixel belongs to; the names are those of the structures, in the order of values.

    Its details are `values`, of the structures in the files; `unit`, "mm" or "px"; `dimensions`; and `patch`,
    the side of the window that slides over large images.
    """

    score = "dice"
    words: ClassVar[dict[str, str]] = {"dice": "Dice", "hd95": "HD95", "surface_dice": "surface Dice"}
    lower = frozenset({"hd95"})
    loss_words = "Dice + cross entropy"

    @property
    def outputs(self) -> int:
        """One for the background, and one a structure."""
        return len(self.names) + 1

    @property
    def size_word(self) -> str:
        """Say what a structure's size is measured in."""
        if self.details["dimensions"] == 3:
            return {"mm": "volume_mm3", "px": "volume_voxels"}[self.details["unit"]]
        return {"mm": "area_mm2", "px": "area_px"}[self.details["unit"]]

    @classmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
        """Check that there are masks."""
        if "mask" not in rows:
            raise TrainerError(f"--data {settings.data} has no masks, and --task segment needs one an image.")

    @classmethod
    def labelled(cls, rows: pd.DataFrame) -> bool:
        """Say whether there are masks."""
        return "mask" in rows

    @classmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
        """Read the masks, number the structures, and measure the pixels."""
        found = load_masks(list(rows["mask"]), list(rows["item"]), list(rows["shape"]), shape)
        broken = [one for one in found if isinstance(one, str)]
        whole = [one for one in found if not isinstance(one, str)]
        if broken and not (settings.skip_broken and whole):
            raise TrainerError(complaint(broken, len(found), "masks"))
        kept = np.array([place for place, one in enumerate(found) if not isinstance(one, str)])
        values = structures_of([values for _, values in whole], settings.structure)
        names = settings.structure or default_names(values)
        labels = numbered(torch.stack([mask for mask, _ in whole]), values)
        sides, unit = sides_in(rows.iloc[kept], shape)
        details = {
            "values": values,
            "unit": unit,
            "dimensions": len(shape),
            "patch": settings.patch_size,
        }
        present = presence(labels, len(values))
        patterns, strata = np.unique(present, axis=0, return_inverse=True)
        notes = notes_on(present, [values for _, values in whole], shape)
        return Targets(
            Masks(labels, sides),
            names,
            strata.reshape(-1).astype(np.int64),
            [" and ".join(np.array(names)[row]) or "no structure" for row in patterns],
            exact=False,
            notes=notes,
            details=details,
            kept=kept,
            broken=broken,
        )

    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Any:
        """Read the masks of those images that have some, by the values that the model was trained with."""
        sides, _ = sides_in(rows, shape, self.details["unit"])
        labels = torch.full((len(rows), *shape), UNKNOWN, dtype=torch.uint8)
        if self.labelled(rows):
            known = np.flatnonzero(rows["mask"].map(len) > 0)
            some = rows.iloc[known]
            found = load_masks(list(some["mask"]), list(some["item"]), list(some["shape"]), shape)
            for place, one in zip(known, found, strict=True):
                if isinstance(one, str):
                    raise TrainerError(one)
                mask, values = one
                new = sorted(set(values) - {0, *self.details["values"]})
                if new:
                    raise TrainerError(
                        f"The mask of {rows['name'].iloc[place]} has the value {new[0]}, and the adapter "
                        f"knows {', '.join(map(str, self.details['values']))}."
                    )
                labels[place] = numbered(mask, self.details["values"])
        return Masks(labels, sides)

    def read_known(self, rows: pd.DataFrame, shape: Sequence[int]) -> Any:
        """Read masks where there are some; the sides of pixels are needed in any case."""
        return self.read_as(rows, shape)

    def loss(self, outputs: Tensor, targets: Any, weights: Tensor | None) -> Tensor:
        """Give the mean of Dice loss and cross entropy of logits (B, S + 1, …)."""
        return dice_ce(outputs, targets[0])

    def keep(self, outputs: Tensor, targets: Any, watched: bool = False) -> tuple[Tensor, Tensor]:
        """Measure each structure of each image, on the grid of the masks; no logits are kept."""
        labels, sides = targets
        kept, sizes = measure(on_grid(outputs, labels.shape[1:]), labels, sides.cpu(), surfaces=not watched)
        # Where the outputs were, several processes gather them.
        return kept.to(outputs.device), sizes.to(outputs.device)

    def kept_loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean of the losses of the images."""
        return outputs[:, 0, PLACES["loss"]].mean()

    def slides(self, shape: Sequence[int]) -> bool:
        """Say whether images of a shape are larger than the patches, so that a window slides over them."""
        patch = self.details["patch"]
        return patch is not None and max(shape) > patch

    def infer(self, network: nn.Module, images: Tensor) -> Tensor:
        """Give the logits, of images that are larger than the patches by a window that slides over them."""
        if not self.slides(images.shape[2:]):
            return super().infer(network, images)
        window = [self.details["patch"]] * (images.ndim - 2)
        outputs = sliding_window_inference(images, window, predictor=network, **SLIDING)
        assert isinstance(outputs, Tensor)
        return outputs.float()

    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Give the mean Dice of the structures, each the mean over the images that have it."""
        return _mean(outputs[..., PLACES["dice"]])

    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score what was measured: means, also by structure, and counts of what was missed or made up."""
        found: dict[str, Any] = {}
        for name in self.words:
            found[name] = _mean(outcome.outputs[..., PLACES[name]])
        for name in self.words:
            found[f"{name}_per_structure"] = outcome.outputs[..., PLACES[name]].nanmean(0).tolist()
        truth, predicted = outcome.targets, outcome.outputs[..., PLACES["size"]]
        found["images_with"] = (truth > 0).sum(0).tolist()
        found["missed"] = ((truth > 0) & (predicted == 0)).sum(0).tolist()
        found["false_alarms"] = ((truth == 0) & (predicted > 0)).sum(0).tolist()
        found["images_without"] = int((truth == 0).all(1).sum())
        return found | {"unit": self.details["unit"]}

    def unit(self, name: str) -> str:
        """Give the unit of distances."""
        return f" {self.details['unit']}" if name == "hd95" else ""

    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out the scores of each structure."""
        lines = self.score_lines(scores)
        table = pd.DataFrame(index=self.names)
        for name, words in self.words.items():
            table[words] = scores[f"{name}_per_structure"]
        table["images with it"] = scores["images_with"]
        table["missed"] = scores["missed"]
        table["false alarms"] = scores["false_alarms"]
        lines += ["", table.to_string(float_format="{:.4f}".format)]
        if scores["images_without"]:
            lines.append(f"({scores['images_without']} images have no structure; they have no Dice)")
        return "\n".join(lines)

    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give the size of each structure; where the truth is known, its scores, and their mean in `dice`."""
        found: dict[str, Any] = {}
        if outputs[..., PLACES["loss"]].isfinite().any():
            found["dice"] = outputs[..., PLACES["dice"]].nanmean(1).tolist()
            for name in self.words:
                for place, structure in enumerate(self.names):
                    found[f"{name}({structure})"] = outputs[:, place, PLACES[name]].tolist()
        for place, structure in enumerate(self.names):
            found[f"{self.size_word}({structure})"] = outputs[:, place, PLACES["size"]].tolist()
        return pd.DataFrame(found)

    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give the true sizes, of kept targets."""
        found = {}
        for place, structure in enumerate(self.names):
            found[f"true_{self.size_word}({structure})"] = targets[:, place].tolist()
        return pd.DataFrame(found)

    def count(self, targets: Any) -> dict[str, int]:
        """Count the images in which each structure is, and those without any."""
        present = presence(targets[0], len(self.names))
        found = {name: int(present[:, place].sum()) for place, name in enumerate(self.names)}
        return found | {"no structure": int((~present.any(1)).sum()), "all": len(present)}

    def write(self, outputs: Tensor, rows: pd.DataFrame, folder: Path) -> None:
        """Write the mask of each image in its own geometry, with the values of the training's masks."""
        # One type for all, also for a mask without the structure that needs 16 bit.
        values = np.array([0, *self.details["values"]], mask_type(self.details["values"]))
        for own, (_, row) in zip(outputs, rows.iterrows(), strict=True):
            mask = values[on_grid(own[None], row["shape"]).argmax(1)[0].numpy()]
            write_mask(mask, row["item"], folder / without_suffix(row["name"]))

    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw the training, and the Dice of the test's images."""
        draw_learning(record, self, outcome.outputs[..., PLACES["dice"]], title, folder / "training.png")

    def show(
        self, network: nn.Module, part: Any, outcome: Outcome, names: Sequence[str], folder: Path
    ) -> None:
        """Draw the test images whose mean Dice is the best, the median and the worst."""
        dice = outcome.outputs[..., PLACES["dice"]].nanmean(1)
        known = torch.nonzero(~dice.isnan()).flatten()
        if not len(known):
            return
        order = known[dice[known].argsort(descending=True)].tolist()
        chosen = {"best": order[0], "median": order[len(order) // 2], "worst": order[-1]}
        examples = []
        for word, place in chosen.items():
            title = f"{word}: Dice {dice[place]:.3f}\n{names[place]}"
            examples.append(self._example(network, part, place, title))
        draw_overlays(examples, self.names, folder / "overlays.png")

    @torch.no_grad()
    def _example(self, network: nn.Module, part: Any, place: int, title: str) -> Example:
        image, (truth, _) = part[place]
        device = next(network.parameters()).device
        outputs = self.infer(network.eval(), image[None].to(device)).cpu()
        predicted = on_grid(outputs, truth.shape).argmax(1)[0]
        # (C, H, W) → (H, W, C)
        pixels = part.pixels[place].movedim(0, -1)
        if truth.ndim == 3:
            number = fullest_slice(truth, predicted)
            title += f", slice {number}"
            pixels, truth, predicted = pixels[number], truth[number], predicted[number]
        return Example(title, pixels.squeeze(-1).numpy(), truth.long().numpy(), predicted.numpy())


def _mean(values: Tensor) -> float:
    """Average each structure over the images (N, S), then the structures; what is not defined is left out."""
    return float(values.nanmean(0).nanmean())
