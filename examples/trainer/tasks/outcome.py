"""What is true of images, and what a model says about them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..files.images import Integers


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


@dataclass
class Mistake:
    """An image about which a model is wrong.

    Attributes:
        row: its position in the outcome.
        words: lines under its picture: what is true, what was predicted, how sure the model was.
        output: position of the output that was wrong.
    """

    row: int
    words: str
    output: int
