"""Which places of an adapted model matter: each switched off in turn, and the score without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.options import require_options
from ..adapters.record import Adapted
from ..architecture.targets import ROLES
from ..checks.copies import copied
from ..errors import require
from ..surgery.strength import base_values
from ..table import Table
from .places import off, places_of
from .scores import Score, ScoreOfImages, Scores, interval


@dataclass(frozen=True)
class PlaceEffect:
    """A place of an adapted model, and what the score loses without it.

    Attributes:
        place: Name of the layer or block.
        methods: The methods that act there.
        parameters: Parameters that train there.
        loss: The score with the place less the score without it; above 0 where the place helps.
        low: Lower end of the 95 % interval of the loss, None where there is none.
        high: Its upper end.
        unscored: Draws of images that have no finite score, as an AUROC without positives; the interval is of
            the others.
    """

    place: str
    methods: str
    parameters: int
    loss: float
    low: float | None = None
    high: float | None = None
    unscored: int = 0


@dataclass(frozen=True)
class _Line:
    place: str
    methods: str
    parameters: int
    interval: str
    loss: str


@dataclass
class Attribution:
    """The result of `attribute`. Print it.

    Attributes:
        model: The class of the model.
        method: The methods, as "bias+norm".
        score: The score with all places.
        base: The score with none of them, the head left as it was trained.
        rows: Every place, the one without which most is lost first.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> model = medpeft.apply(model, "ssf", head=None)
        >>> _ = torch.nn.init.constant_(model[1].adapters.ssf.shift, 1.0)
        >>> _ = torch.nn.init.ones_(model[2].weight)
        >>> x = torch.ones(4, 2)
        >>> found = medpeft.attribute(model, lambda network: float(network(x).mean()))
        >>> [row.place for row in found.rows if row.loss == 0]
        ['0', '2']
        >>> found.best(parameters=4)
        ['1']
    """

    model: str
    method: str
    score: float
    base: float
    rows: list[PlaceEffect] = field(default_factory=list)

    def best(self, share: float = 0.5, *, parameters: int | None = None) -> list[str]:
        """Name the places without which most is lost, for the `target` of another `apply`.

        A place without which nothing is lost is not named, unless there is no other: then the first of all.

        Args:
            share: Share of the places to name at most; at least one.
            parameters: In its place: as many of them as have so many parameters together, those that cost
                more than what is left passed over.
        """
        kinds = {"share": float, "parameters": int | None}
        require_options("best", {"share": share, "parameters": parameters}, kinds)
        require(0 < share <= 1, f"share is {share}; it must be above 0 and at most 1.")
        helping = [row for row in self.rows if row.loss > 0]
        if not helping:
            helping = self.rows[:1]
        if parameters is None:
            return [_as_target(row.place) for row in helping[: max(1, round(share * len(self.rows)))]]
        left, names = parameters, []
        for row in helping:
            if row.parameters <= left:
                names.append(_as_target(row.place))
                left -= row.parameters
        return names

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers, strings, lists and dicts."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The result as GitHub Markdown."""
        return self._table().to_markdown()

    def __str__(self) -> str:
        return str(self._table())

    def _table(self) -> Table:
        notes = [f"score {self.score:.4f}; {self.base:.4f} with every place off and the head as it is"]
        unscored = max((row.unscored for row in self.rows), default=0)
        if unscored:
            notes.append(
                f"up to {unscored} draws of the images have no score; the intervals are of the others"
            )
        title = f"{self.method} on {self.model}: what is lost without a place"
        columns = ("place", "methods", "parameters", "interval", "loss")
        return Table(title, list(map(_line, self.rows)), columns, notes, summed=False)


@torch.no_grad()
def attribute(
    model: nn.Module,
    score: Score | ScoreOfImages,
    *,
    predict: Callable[[nn.Module], Tensor] | None = None,
    by: Literal["layer", "block"] = "layer",
    resamples: int = 1000,
    seed: int = 0,
) -> Attribution:
    """Switch each place of an adapted model off exactly, one after the other, and say what the score loses.

    Off is as in the base: the adapters of the place do not act, and its selected parameters and adapting
    statistics have the base's values. The head stays as it was trained. All this happens in a copy in eval
    mode that shares the frozen parameters, so the model is untouched and may be used meanwhile.

    Take the validation images for it: places that were chosen by the test images fit these.

    Args:
        model: A model after `apply` and training.
        score: Computes the score of a model, the higher the better: a number, or a tensor (N,) of values of N
            images, whose mean it is. With `predict`, the score `score(outputs, images)` of some images, whose
            positions `images` (n,) may repeat, as for macro-F1; NaN where these have none.
        predict: Computes the outputs (N, …) of a model for N images.
        by: Whether a place is a layer, or a block of the model with all layers inside.
        resamples: Draws of the images for the intervals, the same for every place (paired bootstrap, Efron &
            Tibshirani, An Introduction to the Bootstrap, 1993). Where the score is a number there are none.
        seed: Seed of the draws.

    Raises:
        MedpeftError: nothing was applied, the model gave its original values up or its base has changed; a
            score that is no finite number; a place that cannot be switched off alone.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "ssf", head="2")
        >>> x, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> def accuracy(outputs, images):
        ...     return float((outputs[images].argmax(-1) == labels[images]).float().mean())
        >>> found = medpeft.attribute(model, accuracy, predict=lambda network: network(x))
        >>> [(row.place, row.parameters, row.loss) for row in found.rows]
        [('0', 16, 0.0)]
    """
    kinds = {"by": Literal["layer", "block"], "resamples": int, "seed": int}
    require_options("attribute", {"by": by, "resamples": resamples, "seed": seed}, kinds)
    require(resamples > 0, f"resamples is {resamples}; it must be at least 1.")
    return _attribution(model, by, Scores(score, predict, resamples, seed))


def _attribution(model: nn.Module, by: str, scores: Scores) -> Attribution:
    """Score a copy of the model as it is, without each place and without all."""
    adapted = Adapted.of(model)
    base = base_values(adapted, "attribute")
    require(adapted.acting, "attribute does not work inside disabled, scaled or merged: leave that first.")
    copy = copied(model, share_frozen=True).eval()
    places = places_of(Adapted.of(copy), base, by)
    whole = scores.of(scores.run(copy))
    rows = []
    for name, place in places.items():
        with off(copy, [place], name):
            found = scores.run(copy)
        losses = whole - scores.of(found)
        low, high, unscored = interval(losses)
        methods, loss = "+".join(place.methods), float(losses[0])
        rows.append(PlaceEffect(name, methods, place.parameters, loss, low, high, unscored))
    rows.sort(key=lambda row: -row.loss)
    with off(copy, list(places.values()), "all"):
        found = scores.run(copy)
    without = float(scores.of(found)[0])
    return Attribution(type(model).__name__, adapted.record.name, float(whole[0]), without, rows)


def _line(row: PlaceEffect) -> _Line:
    ends = ""
    if row.low is not None and row.high is not None:
        ends = f"[{row.low:+.4f}, {row.high:+.4f}]"
    return _Line(row.place, row.methods, row.parameters, ends, f"{row.loss:+.4f}")


def _as_target(place: str) -> str:
    """Write the name of a place as a pattern that picks it alone: `norm` alone would pick every norm."""
    if place in ROLES:
        return f"[{place[0]}]{place[1:]}"
    return place
