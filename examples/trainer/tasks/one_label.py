"""What tasks have in common in which an image has one of several names: a class or a grade."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..judging.conformal import sets_of
from .task import Task


class OneLabel(Task):
    """Which of several names an image has. Targets are positions in `names`."""

    @classmethod
    def named(cls, rows: pd.DataFrame) -> list[str]:
        """Give the labels."""
        return list(rows["label"])

    def read_as(self, rows: pd.DataFrame, shape: Sequence[int]) -> Tensor:
        """Number the labels."""
        return torch.tensor([self.names.index(label) for label in rows["label"]])

    def truths(self, targets: Tensor) -> pd.DataFrame:
        """Give `label`."""
        return pd.DataFrame({"label": [self.names[i] for i in targets.tolist()]})

    def count(self, targets: Tensor) -> dict[str, int]:
        """Count the images of each name."""
        counts = torch.bincount(targets, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def said(self, predicted: Tensor, probabilities: Tensor) -> pd.DataFrame:
        """Give `prediction`, of positions (N,), and each name's probability (N, C) in `p(NAME)`."""
        found = pd.DataFrame({"prediction": [self.names[i] for i in predicted.tolist()]})
        for place, name in enumerate(self.names):
            found[f"p({name})"] = probabilities[:, place].tolist()
        return found

    def sets(self, probabilities: Tensor, fitted: Mapping[str, Any]) -> list[str]:
        """Write the conformal set of each image, of probabilities (N, C), as in `benign|normal`."""
        inside = sets_of(probabilities.double().numpy(), fitted["sets"]["cutoff"])
        names = np.array(self.names)
        return ["|".join(names[row]) for row in inside]
