"""What a task is: how images are labelled, learned, scored, written down and drawn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ..files.images import Integers
from ..judging.quick import Floats
from ..judging.resampling import describe_draws
from ..judging.resampling import intervals as intervals_of
from ..judging.subgroups import describe_worst
from ..settings import Settings
from .outcome import Mistake, Outcome, Targets


class Task(ABC):
    """What is asked about an image.

    Attributes:
        score: by which the epoch is chosen and methods are compared; the higher the better.
        words: what the scores are called, those that are printed, `score` the first.
        lower: the scores that are the better the lower they are.
        loss_words: what the loss is called.
        draws: of the bootstrap.
        names: of the outputs.
        details: as in `Targets`.
    """

    score: ClassVar[str]
    words: ClassVar[dict[str, str]]
    lower: ClassVar[frozenset[str]] = frozenset()
    loss_words: ClassVar[str]
    draws: ClassVar[int] = 200

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.details: dict[str, Any] = {}

    def informed(self, details: Mapping[str, Any]) -> "Task":
        """Take over the details, and return the task itself."""
        self.details = dict(details)
        return self

    @property
    def outputs(self) -> int:
        """How many outputs the model has."""
        return len(self.names)

    @classmethod
    @abstractmethod
    def check(cls, rows: pd.DataFrame, settings: Settings) -> None:
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
    def read(cls, rows: pd.DataFrame, shape: Sequence[int], settings: Settings) -> Targets:
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

    def fit_thresholds(self, outcome: Outcome, rule: str) -> dict[str, Any]:
        """Fit operating points to the validation part by a rule of `thresholds.py`, by default none.

        What is given joins `fitted`, which `scores`, `predictions` and the adapter's metadata have.
        """
        return {}

    def fit_sets(self, outcome: Outcome, coverage: float) -> dict[str, Any]:
        """Fit to the validation part what it takes to hold the truth at a coverage, by default nothing.

        Sets of classes, or an interval of a quantity; what is given joins `fitted`.
        """
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

    def mistakes(self, outcome: Outcome) -> list[Mistake]:
        """Give the mistakes, the most confident first, for a gallery; by default none."""
        return []

    def numbers(self, outcome: Outcome, counts: Floats) -> dict[str, Floats]:
        """Give what has an interval, by default `words`, for D draws of the N images.

        Args:
            outcome: of N images.
            counts: (D, N), how often each image is in each draw.

        Returns:
            A number (D,) by each name.
        """
        found: dict[str, list[float]] = {name: [] for name in self.words}
        for drawn in torch.from_numpy(counts).long():
            rows = torch.arange(len(drawn)).repeat_interleave(drawn)
            scores = self.scores(outcome.rows(rows))
            for name, values in found.items():
                values.append(float(scores[name]))
        return {name: np.array(values) for name, values in found.items()}

    def intervals(self, outcome: Outcome, groups: Integers, seed: int) -> dict[str, Any]:
        """Give the 95 % interval of each of `numbers`, and under `bootstrap` what it rests on.

        Args:
            outcome: of N images.
            groups: (N,), images with one number, such as a patient's, are drawn together.
            seed: of the draws.
        """
        found: dict[str, Any] = intervals_of(partial(self.numbers, outcome), groups, self.draws, seed)
        found["bootstrap"] = {
            "draws": self.draws,
            "groups": len(np.unique(groups)),
            "images": len(groups),
        }
        return found

    def unit(self, name: str) -> str:
        """Give the unit of a score after a blank, "" for a plain number."""
        return ""

    def score_lines(self, scores: Mapping[str, Any]) -> list[str]:
        """Lay out the scores that are shown, a line each, with their intervals where there are some."""
        lines, found = [], scores.get("intervals")
        width = max(20, 2 + max(map(len, self.words.values())))
        for name, words in self.words.items():
            line = f"  {words:<{width}}{scores[name]:.4f}{self.unit(name)}"
            if found:
                line += "  {:.4f} to {:.4f}".format(*found[name])
            lines.append(line)
        if found:
            lines.append(f"  ({describe_draws(found['bootstrap'])})")
        return lines

    def score_subgroups(
        self, outcome: Outcome, subgroups: Sequence[str], groups: Integers, seed: int
    ) -> dict[str, dict[str, Any]]:
        """Score each subgroup of patients by itself, with its number of `images` and its `intervals`."""
        found = {}
        for name in sorted(set(subgroups)):
            rows = torch.tensor([subgroup == name for subgroup in subgroups])
            own = outcome.rows(rows)
            found[name] = {"images": int(rows.sum()), **self.scores(own)}
            found[name]["intervals"] = self.intervals(own, groups[rows.numpy()], seed)
        return found

    def subgroup_table(self, found: Mapping[str, Mapping[str, Any]]) -> str:
        """Lay out the scores of subgroups, and name the worst."""
        columns = ["images", *self.words]
        table = pd.DataFrame.from_dict(found, orient="index")[columns].rename_axis("subgroup")
        lines = [table.to_string(float_format="{:.4f}".format)]
        worst = describe_worst(found, self.score, self.words)
        if worst:
            lines.append(worst)
        return "\n".join(lines)
