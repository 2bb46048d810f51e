"""What fits into a memory: methods, selections and checkpointing, with the forecast of a step of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import nn

from ..adapters.options import require_options
from ..adapters.record import require_model
from ..adapters.requests import Methods
from ..architecture.checkpointing import switch_on_checkpointing
from ..checkpoint.messages import clip
from ..checks.copies import trainable, without_values
from ..errors import MedpeftError, clipped, require
from ..surgery.apply import apply
from ..table import Table
from .peak import Step, forecast

METHODS: tuple[Methods, ...] = ("full", "lora", "ssf", "bias", "linear_probe")
_WHOLE_AND_LAST = ({"depth": 1.0}, {"depth": 0.5}, {"depth": 0.25})


@dataclass(frozen=True)
class Fit:
    """One way to train a model, with the forecast of a step.

    Attributes:
        keywords: What to pass to `apply`: method, target and so on.
        checkpointing: Whether activations are computed anew in backward.
        trainable: Parameters that train.
        depth: Share of the forward's operations from the first trainable tensor on.
        peak_bytes: Most bytes of tensors at one time in a step.
        training_flops: Operations of a step.
        fits: Whether the peak is within the memory.
    """

    keywords: dict[str, Any]
    checkpointing: bool
    trainable: int
    depth: float
    peak_bytes: int
    training_flops: int
    fits: bool


@dataclass(frozen=True)
class _Line:
    method: str
    selection: str
    checkpointing: str
    trainable: int
    depth: str
    gflops: str
    peak: str


@dataclass
class Fits:
    """The result of `fits`. Print it.

    Attributes:
        model: The class of the model.
        memory: Bytes to fit into.
        rows: Every way, in the order of `fits`.
        left_out: Why others are not there.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2))
        >>> found = medpeft.fits(model, torch.randn(8, 64), methods=["bias"], selections=[{"head": "2"}])
        >>> len(found.rows), found.best.trainable, found.best.checkpointing
        (1, 1538, False)
    """

    model: str
    memory: int
    rows: list[Fit]
    left_out: list[str] = field(default_factory=list)

    @property
    def best(self) -> Fit | None:
        """The first way that fits, None if none does."""
        for row in self.rows:
            if row.fits:
                return row
        return None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain numbers, strings, lists and dicts."""
        return asdict(self)

    def to_markdown(self) -> str:
        """The result as GitHub Markdown."""
        return self._table().to_markdown()

    def __str__(self) -> str:
        return str(self._table())

    def _table(self) -> Table:
        columns = ("method", "selection", "checkpointing", "trainable", "depth", "gflops", "peak")
        fitting = sum(row.fits for row in self.rows)
        note = f"{fitting} of {len(self.rows)} fit into {_mib(self.memory)}; these come first"
        lines = list(map(_line, self.rows))
        title = f"a training step of {self.model}"
        return Table(title, lines, columns, [note, *self.left_out], summed=False)


def fits(
    model: nn.Module,
    example_input: Any,
    memory: int = 6 * 2**30,
    *,
    methods: Sequence[Methods] = METHODS,
    selections: Sequence[Mapping[str, Any]] | None = None,
    optimizer_states: int = 2,
) -> Fits:
    """Forecast the peak memory and the operations of a training step for many ways to train a model.

    Nothing is computed, and the model is not touched. Rows that fit come first; then the deepest, by eighths
    of the forward; then the one with the most trainable parameters; then the one without activation
    checkpointing, which trains the same faster. The peak counts all tensors, the optimizer's too, but nothing
    that a device or a library takes beside: a CUDA context, workspaces of convolutions, fragments.

    Args:
        model: A model before `apply`, in the precision in which it trains.
        example_input: A batch as in training: an input, a tuple of inputs, or a mapping of keyword inputs;
            values do not count.
        memory: Bytes to fit into.
        methods: Methods as `apply` takes them.
        selections: Further keywords of `apply`, each to be tried with every method, as
            `{"target": "blocks.*"}`. None is the whole model, and its last half and quarter
            (`depth`).
        optimizer_states: Tensors that the optimizer keeps for each parameter: 2 for Adam, 0 for plain SGD.

    Raises:
        MedpeftError: no method fits the model; or it does not run without values, as the message explains.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 2))
        >>> ways = {"methods": ["full", "linear_probe"], "selections": [{"head": "2"}]}
        >>> found = medpeft.fits(model, torch.randn(8, 64), memory=200_000, **ways)
        >>> found.best.keywords
        {'method': 'linear_probe', 'head': '2'}
    """
    require_model(model)
    if selections is None:
        selections = _WHOLE_AND_LAST
    _require_sensible(memory, methods, selections, optimizer_states)
    found = Fits(type(model).__name__, memory, [])
    for method in methods:
        for selection in selections:
            keywords = {"method": method, **selection}
            _add_ways(found, model, example_input, keywords, optimizer_states)
    require(bool(found.rows), "\n  ".join([f"No method trains this {found.model}:", *found.left_out]))
    found.rows.sort(key=_order)
    return found


def _require_sensible(memory: int, methods: object, selections: object, optimizer_states: int) -> None:
    """Raise `MedpeftError` where an argument of `fits` is none that it may be."""
    numbers = {"memory": memory, "optimizer_states": optimizer_states}
    require_options("fits", numbers, {"memory": float, "optimizer_states": int})
    require(memory > 0, f"memory={memory} is no number of bytes: write 6 * 2**30 for 6 GiB.")
    require(optimizer_states >= 0, f"optimizer_states={optimizer_states} must be 0 or more.")
    if isinstance(methods, str) or not isinstance(methods, Iterable):
        raise MedpeftError(f"methods={clipped(methods)} must be a list of methods.")
    if not isinstance(selections, (list, tuple)) or not all(isinstance(one, Mapping) for one in selections):
        raise MedpeftError(f"selections={clipped(selections)} must be a list of dicts of keywords.")


def _add_ways(
    found: Fits, model: nn.Module, example: Any, keywords: dict[str, Any], optimizer_states: int
) -> None:
    """Forecast the ways of a candidate, and add those that are not there; or the reason why there is none."""
    try:
        ways = _ways(model, example, keywords, optimizer_states)
    except MedpeftError as error:
        reason = f"{keywords['method']}: {clip(error)}"
        if reason not in found.left_out:
            found.left_out.append(reason)
        return
    for checkpointing, (parameters, step) in ways.items():
        row = _fit(keywords, checkpointing, parameters, step, found.memory)
        # Another depth of a linear probe is the same linear probe.
        if all(_but_for_selection(row) != _but_for_selection(other) for other in found.rows):
            found.rows.append(row)


def _but_for_selection(row: Fit) -> Fit:
    return replace(row, keywords={"method": row.keywords["method"]})


def _ways(
    model: nn.Module, example: Any, keywords: dict[str, Any], optimizer_states: int
) -> dict[bool, tuple[int, Step]]:
    """Forecast a step without checkpointing, and with it where that makes the peak lower."""
    copy = apply(without_values(model), **keywords)
    parameters = sum(parameter.numel() for parameter in trainable(copy).values())
    ways = {False: (parameters, forecast(copy, example, optimizer_states))}
    if switch_on_checkpointing(copy):
        step = forecast(copy, example, optimizer_states)
        if step.peak_bytes < ways[False][1].peak_bytes:
            ways[True] = parameters, step
    return ways


def _fit(keywords: dict[str, Any], checkpointing: bool, parameters: int, step: Step, memory: int) -> Fit:
    return Fit(
        keywords=keywords,
        checkpointing=checkpointing,
        trainable=parameters,
        depth=step.trained_share,
        peak_bytes=step.peak_bytes,
        training_flops=step.training_flops,
        fits=step.peak_bytes <= memory,
    )


def _order(row: Fit) -> tuple[bool, int, int, bool]:
    return not row.fits, -round(8 * row.depth), -row.trainable, row.checkpointing


def _line(row: Fit) -> _Line:
    selection = []
    for name, value in row.keywords.items():
        if name != "method":
            selection.append(f"{name}={value}")
    return _Line(
        method=str(row.keywords["method"]),
        selection=", ".join(selection) or "all",
        checkpointing="yes" if row.checkpointing else "no",
        trainable=row.trainable,
        depth=f"{row.depth:.2f}",
        gflops=f"{row.training_flops / 1e9:,.4g}",
        peak=_mib(row.peak_bytes),
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
