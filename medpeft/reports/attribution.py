"""Which places of an adapted model matter: each switched off, one after the other, and the score without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace, parameters_of
from ..adapters.adapters import Adapters
from ..adapters.options import require_options
from ..adapters.record import Adapted
from ..architecture.layers import within
from ..architecture.network import Network
from ..checks.copies import copied
from ..errors import MedpeftError, require
from ..surgery.strength import base_values
from ..table import Table

Score = Callable[[nn.Module], float | Tensor]
ScoreOfRows = Callable[[Any, Tensor], float]


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
    """

    place: str
    methods: str
    parameters: int
    loss: float
    low: float | None = None
    high: float | None = None

    def as_text(self) -> _Line:
        """Write the numbers out."""
        interval = ""
        if self.low is not None and self.high is not None:
            interval = f"[{self.low:+.4f}, {self.high:+.4f}]"
        return _Line(self.place, self.methods, self.parameters, interval, f"{self.loss:+.4f}")


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
        >>> x = torch.ones(4, 2)
        >>> found = medpeft.attribute(model, lambda network: float(network(x).abs().mean()))
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

        Args:
            share: Share of the places to name; at least one.
            parameters: In its place: as many of them as have so many parameters together, those that cost
                more than what is left passed over.
        """
        require_options("best", {"share": share}, {"share": float})
        require(0 < share <= 1, f"share is {share}; it must be above 0 and at most 1.")
        if parameters is None:
            return [row.place for row in self.rows[: max(1, round(share * len(self.rows)))]]
        left, names = parameters, []
        for row in self.rows:
            if row.parameters <= left:
                names.append(row.place)
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
        note = f"score {self.score:.4f}; {self.base:.4f} with every place off and the head as it is"
        title = f"{self.method} on {self.model}: what is lost without a place"
        columns = ("place", "methods", "parameters", "interval", "loss")
        return Table(title, [row.as_text() for row in self.rows], columns, [note], summed=False)


@dataclass
class _Place:
    """Adapters and selected parameters of one layer or block.

    Attributes:
        adapters: Each with those of its layer and its name there.
        values: The base's values of selected parameters and adapting statistics, by name.
        methods: Names of the methods, once each.
        parameters: How many parameters train.
    """

    adapters: list[tuple[Adapters, str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    methods: dict[str, None] = field(default_factory=dict)
    parameters: int = 0


@torch.no_grad()
def attribute(
    model: nn.Module,
    score: Score | ScoreOfRows,
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
            images, whose mean it is. With `predict`, the score `score(outputs, rows)` of some images, whose
            positions `rows` (n,) may repeat, as for macro-F1.
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
        >>> def accuracy(outputs, rows):
        ...     return float((outputs[rows].argmax(-1) == labels[rows]).float().mean())
        >>> found = medpeft.attribute(model, accuracy, predict=lambda network: network(x))
        >>> [(row.place, row.parameters, row.loss) for row in found.rows]
        [('0', 16, 0.0)]
    """
    kinds = {"by": Literal["layer", "block"], "resamples": int, "seed": int}
    require_options("attribute", {"by": by, "resamples": resamples, "seed": seed}, kinds)
    require(resamples > 0, f"resamples is {resamples}; it must be at least 1.")
    adapted = Adapted.of(model)
    base = base_values(adapted, "attribute")
    require(adapted.acting, "attribute does not work inside disabled, scaled or merged: leave that first.")
    copy = copied(model, share_frozen=True).eval()
    places = _places(Adapted.of(copy), base, by)
    reading = _Reading(score, predict, resamples, seed)
    whole = reading.of(copy)
    rows = []
    for name, place in places.items():
        with _off(copy, [place], name):
            losses = whole - reading.of(copy)
        low = high = None
        if len(losses) > 1:
            low, high = torch.quantile(losses[1:], torch.tensor([0.025, 0.975], dtype=losses.dtype)).tolist()
        methods = "+".join(place.methods)
        rows.append(PlaceEffect(name, methods, place.parameters, float(losses[0]), low, high))
    rows.sort(key=lambda row: -row.loss)
    with _off(copy, list(places.values()), "all"):
        without = float(reading.of(copy)[0])
    return Attribution(type(model).__name__, adapted.record.name, float(whole[0]), without, rows)


def _places(adapted: Adapted, base: dict[str, Tensor], by: str) -> dict[str, _Place]:
    """Find the places of an adapted model, by name, in the order of its modules."""
    blocks = []
    if by == "block":
        blocks = Network(adapted.model, adapted.record.head).outermost_blocks
        require(
            bool(blocks), f"No kind of block is known in {type(adapted.model).__name__}: leave by='layer'."
        )
    places: dict[str, _Place] = {}
    for _, _, adapters in adapted.layers:
        for name, adapter in adapters.adapters():
            first = adapter.first if isinstance(adapter, SecondPlace) else adapter
            place = places.setdefault(_place_of(_layer_of(first, adapted), blocks), _Place())
            place.adapters.append((adapters, name))
            place.methods[first.method] = None
            place.parameters += sum(parameter.numel() for _, parameter in parameters_of(adapter))
    for name, tensor in adapted.trained.items():
        method = adapted.record.selected.get(name, "")
        if method == "head":
            continue
        place = places.setdefault(_place_of(name.rpartition(".")[0], blocks), _Place())
        place.values[name] = base[name]
        if method:
            place.methods[method] = None
            place.parameters += tensor.numel()
    return places


def _layer_of(adapter: Adapter, adapted: Adapted) -> str:
    """Name the layer of an adapter."""
    for name, _, adapters in adapted.layers:
        if any(other is adapter for _, other in adapters.adapters()):
            return name
    raise AssertionError("The first place of an adapter is on a layer of its model.")


def _place_of(layer: str, blocks: Sequence[str]) -> str:
    """Name the block that a layer lies in, or the layer itself where it lies in none."""
    for block in blocks:
        if within(layer, [block]):
            return block
    return layer


@contextmanager
def _off(copy: nn.Module, places: Sequence[_Place], name: str) -> Iterator[None]:
    """Make places of a copy those of the base for a `with` block.

    Raises:
        MedpeftError: the model does not run then.
    """
    tensors: dict[str, Any] = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    trained = {}
    silent: dict[Adapters, list[str]] = {}
    for place in places:
        for adapters, adapter in place.adapters:
            silent.setdefault(adapters, []).append(adapter)
        for value in place.values:
            trained[value] = tensors[value].clone()
            tensors[value].copy_(place.values[value])
    for adapters, names in silent.items():
        left = [other for other, _ in adapters.adapters() if other not in names]
        adapters.let_act(left)
        adapters.enabled = bool(left)
    try:
        yield
    except MedpeftError as error:
        raise MedpeftError(f"{name!r} cannot be switched off alone: {error}") from error
    finally:
        for adapters in silent:
            adapters.let_act([other for other, _ in adapters.adapters()])
            adapters.enabled = True
        for value, tensor in trained.items():
            tensors[value].copy_(tensor)


class _Reading:
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
        self.score, self.predict, self.resamples = score, predict, resamples
        self.generator = torch.Generator().manual_seed(seed)
        self.draws: Tensor | None = None

    def of(self, model: nn.Module) -> Tensor:
        """Compute the scores (1 + resamples,) of a model; (1,) where the score is a number.

        Raises:
            MedpeftError: one is not finite, or the images are not as many as before.
        """
        if self.predict is not None:
            outputs = self.predict(model)
            scores = [float(self.score(outputs, rows)) for rows in self._rows(len(outputs))]
            found = torch.tensor(scores, dtype=torch.float64)
        else:
            value = self.score(model)
            if isinstance(value, Tensor) and value.ndim == 1:
                values = value.detach().to("cpu", torch.float64)
                found = torch.stack([values[rows].mean() for rows in self._rows(len(values))])
            else:
                found = torch.tensor([float(value)], dtype=torch.float64)
        require(
            bool(found[0].isfinite()),
            f"score gave {float(found[0])} in place of a finite number; the higher it is the better.",
        )
        return found

    def _rows(self, count: int) -> Iterator[Tensor]:
        """Yield the positions of all images, then those of every draw, the same each time."""
        if self.draws is None:
            self.draws = torch.randint(count, (self.resamples, count), generator=self.generator)
        require(
            count == self.draws.shape[1],
            f"score was given {self.draws.shape[1]} images first and now {count}; it must be the same ones.",
        )
        yield torch.arange(count)
        yield from self.draws
