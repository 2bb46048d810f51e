"""The score of a model that `attribute` asks for: of all images, and of draws of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MedpeftError, clipped, require

Score = Callable[[nn.Module], float | Tensor]
ScoreOfImages = Callable[[Any, Tensor], float]


class Scores:
    """The score of a model: of all images first, then of every draw of them.

    Args:
        score: As in `attribute`.
        predict: As in `attribute`.
        resamples: As in `attribute`.
        seed: As in `attribute`.
    """

    def __init__(
        self,
        score: Callable[..., Any],
        predict: Callable[[nn.Module], Tensor] | None,
        resamples: int,
        seed: int,
    ) -> None:
        require(callable(score), f"score={clipped(score)} must be a function.")
        require(
            predict is None or callable(predict), f"predict={clipped(predict)} must be a function or None."
        )
        self.score, self.predict, self.resamples = score, predict, resamples
        self.generator = torch.Generator().manual_seed(seed)
        self.draws: Tensor | None = None

    def run(self, model: nn.Module) -> Any:
        """Run a model: the outputs of `predict`, or without that what `score` gives."""
        if self.predict is None:
            return self.score(model)
        outputs = self.predict(model)
        require(
            isinstance(outputs, (Tensor, np.ndarray)) and outputs.ndim > 0,
            f"predict gave a {type(outputs).__name__} in place of one tensor (N, …), an output for each "
            "image: take it out of what the model returns.",
        )
        return outputs

    def of(self, found: Any) -> Tensor:
        """Compute the scores (1 + resamples,) of what `run` gave; (1,) where the score is a number.

        That of a draw is NaN where it has none, as the AUROC of a draw without positives.

        Raises:
            MedpeftError: that of all images is not finite, or they are not as many as before.
        """
        if self.predict is not None:
            scores = [_number(self.score(found, images)) for images in self._drawn(len(found))]
            of_draws = torch.tensor(scores, dtype=torch.float64)
        elif isinstance(found, Tensor) and found.ndim == 1:
            values = found.detach().to("cpu", torch.float64)
            of_draws = torch.stack([values[images].mean() for images in self._drawn(len(values))])
        else:
            of_draws = torch.tensor([_number(found)], dtype=torch.float64)
        require(
            bool(of_draws[0].isfinite()),
            f"score gave {float(of_draws[0])} in place of a finite number; the higher it is the better.",
        )
        return of_draws

    def _drawn(self, count: int) -> Iterator[Tensor]:
        """Yield the positions of all images, then those of every draw, the same each time."""
        require(count > 0, "attribute was given the outputs or scores of no images.")
        if self.draws is None:
            self.draws = torch.randint(count, (self.resamples, count), generator=self.generator)
        require(
            count == self.draws.shape[1],
            f"score was given {self.draws.shape[1]} images first and now {count}; it must be the same ones.",
        )
        yield torch.arange(count)
        yield from self.draws


def _number(score: Any) -> float:
    """Return a score as a number, or raise `MedpeftError`."""
    try:
        return float(score)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MedpeftError(
            f"score gave {clipped(score)} in place of a number, or without predict a tensor (N,)."
        ) from error


def interval(losses: Tensor) -> tuple[float | None, float | None, int]:
    """Compute the 95 % interval of a loss, (1 + resamples,), by the draws that have a score.

    Returns:
        Its two ends, None where no draw has a score; and the number of draws that have none.
    """
    draws = losses[1:]
    scored = draws[draws.isfinite()]
    if not len(scored):
        return None, None, len(draws)
    low, high = torch.quantile(scored, torch.tensor([0.025, 0.975], dtype=scored.dtype)).tolist()
    return low, high, len(draws) - len(scored)
