"""What a task is: how images are labelled, learned, scored, written down and drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..settings import Settings

Integers = npt.NDArray[np.int64]
DRAWS = 200  # of the bootstrap


@dataclass
class Targets:
    """What is to be learned about N images.

    Attributes:
        values: (N, …), one target an image: a tensor, or what is indexed like one.
        names: of the outputs: classes, findings, structures, or the quantity.
        strata: (N,), positions in `stratum_names`: each stratum keeps its share in every part of a split.
        stratum_names: in a message.
        exact: whether a split must have every stratum in every part; else rare ones join the largest.
        notes: lines for the user.
        details: what the task has to know besides the names; they travel with the adapter.
        kept: positions of the images whose target could be read, None for all.
        broken: what is wrong with each of the others.
    """

    values: Any
    names: list[str]
    strata: Integers
    stratum_names: list[str]
    exact: bool = True
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    kept: Integers | None = None
    broken: list[str] = field(default_factory=list)


@dataclass
class Outcome:
    """What a model said about some images, and what is true.

    Attributes:
        outputs: (N, …), of the model, on the CPU; what the task keeps of them.
        targets: (N, …).
        fitted: what was fitted on the validation part, such as the temperature.
    """

    outputs: Tensor
    targets: Tensor
    fitted: Mapping[str, Any]

    def rows(self, chosen: Tensor) -> "Outcome":
        """Give the outcome of some of the images, by their positions or a mask."""
        return Outcome(self.outputs[chosen], self.targets[chosen], self.fitted)


class Task(ABC):
    """What is asked about an image.

    Attributes:
        score: by which the epoch is chosen and methods are compared; the higher the better.
        words: what the scores are called, those that are printed, `score` the first.
        lower: the scores that are the better the lower they are.
        loss_words: what the loss is called.
        names: of the outputs.
        details: as in `Targets`.
    """

    score: ClassVar[str]
    words: ClassVar[dict[str, str]]
    lower: ClassVar[frozenset[str]] = frozenset({"calibration_error", "mae", "rmse"})
    loss_words: ClassVar[str]

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.details: dict[str, Any] = {}

    def informed(self, details: Mapping[str, Any]) -> "Task":
        """Give the task as it is once it knows its details."""
        self.details = dict(details)
        return self

    @property
    def outputs(self) -> int:
        """How many outputs the model has."""
        return len(self.names)

    @classmethod
    @abstractmethod
    def check(cls, rows: pd.DataFrame, settings: "Settings") -> None:
        """Check what can be checked before an image is read.

        Args:
            rows: one an image, as of `Rows.table`.
            settings: of the run.

        Raises:
            TrainerError: the labels make no sense.
        """

    @classmethod
    def labelled(cls, rows: pd.DataFrame) -> bool:
        """Say whether rows bring what the task asks for."""
        return "label" in rows

    @classmethod
    def named(cls, rows: pd.DataFrame) -> list[str]:
        """Give the names of classes or findings that rows bring: those of another site must be among them."""
        return []

    @classmethod
    @abstractmethod
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: "Settings") -> Targets:
        """Read the targets of a labelled set.

        Args:
            rows: one an image, as of `Rows.table`.
            shape: of the images in memory, (H, W) or (D, H, W).
            settings: of the run.
        """

    def prepared(self, targets: Tensor) -> "Task":
        """Give the task as it is once it knows the targets of the training part."""
        return self

    @abstractmethod
    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Any:
        """Read targets for a model that has its names already."""

    def read_known(self, rows: pd.DataFrame, shape: Sequence[int]) -> Any:
        """Read targets where rows bring them, else NaN for each."""
        if self.labelled(rows):
            return self.read_as(rows, shape)
        return torch.full((len(rows),), math.nan)

    def weigh(self, targets: Tensor) -> Tensor | None:
        """Give weights for the loss by which what is rare counts as much as what is common."""
        return None

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean loss of a batch."""

    def keep(self, outputs: Tensor, targets: Any, watched: bool = False) -> tuple[Tensor, Tensor]:
        """Reduce outputs and targets of a batch to what the scores need; `watched`: to what `watch` needs."""
        return outputs, targets

    def kept_loss(self, outputs: Tensor, targets: Tensor, weights: Tensor | None) -> Tensor:
        """Give the mean loss of what was kept of a part."""
        return self.loss(outputs, targets, weights)

    def infer(self, network: nn.Module, images: Tensor) -> Tensor:
        """Give the outputs for images that are not trained on."""
        outputs: Tensor = network(images)
        return outputs.float()

    @abstractmethod
    def watch(self, outputs: Tensor, targets: Tensor) -> float:
        """Compute `score` alone, of outputs as they are."""

    def fit(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        """Fit what the predictions need, such as a temperature, to the validation part."""
        return {}

    @abstractmethod
    def scores(self, outcome: Outcome) -> dict[str, Any]:
        """Score an outcome: each of `words` and more, NaN where one is not defined."""

    @abstractmethod
    def table(self, outcome: Outcome, scores: Mapping[str, Any]) -> str:
        """Lay out scores for a terminal."""

    @abstractmethod
    def predictions(self, outputs: Tensor, fitted: Mapping[str, Any]) -> pd.DataFrame:
        """Give what is predicted of each image: the columns of predictions.csv."""

    @abstractmethod
    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give what is true of each image: further columns."""

    @abstractmethod
    def count(self, targets: Tensor) -> dict[str, int]:
        """Count images by what is true of them."""

    def write(self, outputs: Tensor, rows: pd.DataFrame, folder: Path) -> None:
        """Write what is predicted of each image as an image; most tasks have none."""
        return

    def show(
        self, network: nn.Module, part: Any, outcome: Outcome, names: Sequence[str], folder: Path
    ) -> None:
        """Draw images of the test with what is predicted of them; most tasks have nothing to draw there."""
        return

    @abstractmethod
    def draw(self, outcome: Outcome, record: Mapping[str, Any], title: str, folder: Path) -> None:
        """Draw a run: how it was trained, and its test.

        Args:
            outcome: of the test.
            record: the metrics.
            title: one line above all.
            folder: for the pictures.
        """

    def interval(self, outcome: Outcome, seed: int) -> list[float]:
        """Give the 95 % interval of `score`, by drawing the images anew (Efron & Tibshirani, 1993)."""
        generator = torch.Generator().manual_seed(seed)
        count = len(outcome.targets)
        found = []
        for _ in range(DRAWS):
            drawn = torch.randint(count, (count,), generator=generator)
            found.append(self.watch(outcome.outputs[drawn], outcome.targets[drawn]))
        low, high = np.nanquantile(found, [0.025, 0.975])
        return [float(low), float(high)]

    def score_subgroups(self, outcome: Outcome, subgroups: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Score each subgroup of patients by itself, with the number of its images in `images`."""
        found = {}
        for name in sorted(set(subgroups)):
            rows = torch.tensor([subgroup == name for subgroup in subgroups])
            found[name] = {"images": int(rows.sum()), **self.scores(outcome.rows(rows))}
        return found

    def subgroup_table(self, found: Mapping[str, Mapping[str, Any]]) -> str:
        """Lay out the scores of subgroups."""
        columns = ["images", *self.words]
        table = pd.DataFrame.from_dict(found, orient="index")[columns].rename_axis("subgroup")
        return str(table.to_string(float_format="{:.4f}".format))
