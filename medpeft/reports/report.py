"""What trains, in numbers: a table per method and per layer type."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter, parameters_of
from ..adapters.record import adapted_layers, own_state, require_applied, trained_tensors
from ..table import Row, Table
from .costs import Costs, costs, full_costs


@dataclass
class Report:
    """What an adapted model trains. Print it.

    Attributes:
        method: The methods, as "bias+norm".
        trainable: Parameters that train, the head's included.
        total: All parameters, the adapters' included.
        head: Parameters of the head.
        checkpoint_bytes: Bytes of the tensors that `save` writes.
        rows: Trainable parameters per method and layer type, the head apart.
        warnings: Layers whose adapter is larger than they are.
        costs: Costs of one training step on the example input, None without one.
        full_costs: The same for full fine-tuning, without adapters.
    """

    method: str
    model: str
    trainable: int
    total: int
    head: int
    checkpoint_bytes: int
    rows: list[Row]
    warnings: list[str]
    costs: Costs | None = None
    full_costs: Costs | None = None

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / max(self.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings, lists and dicts."""
        plain = {k: v for k, v in vars(self).items() if k not in ("rows", "costs", "full_costs")}
        steps = {k: None if v is None else dict(vars(v)) for k, v in (("costs", self.costs), ("full_costs", self.full_costs))}
        return {**plain, **steps, "percent": self.percent, "rows": [dict(vars(row)) for row in self.rows]}

    def _table(self) -> Table:
        notes = [
            (
                f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.4g}%), "
                f"{self.head:,} of them in the head; checkpoint {self.checkpoint_bytes:,} bytes"
            ),
            *_compared(self.costs, self.full_costs),
            *(f"warning: {text}" for text in self.warnings),
        ]
        return Table(f"{self.method} on {self.model}", self.rows, ("method", "type", "parameters"), notes)

    def __str__(self) -> str:
        return str(self._table())

    def to_markdown(self) -> str:
        """The report as GitHub Markdown."""
        return self._table().to_markdown()

    def _repr_html_(self) -> str:
        return self._table().to_html()


def report(model: nn.Module, example_input: Any = None) -> Report:
    """What an adapted model trains, per method and per layer type, the head apart.

    Args:
        model: A model after `apply`.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs: the operations of a training step on it, and
            the memory that it keeps for backward, are then counted beside those of full fine-tuning. Nothing is computed.

    Raises:
        MedpeftError: nothing was applied, or the model cannot run without values, as the message explains.
    """
    record = require_applied(model)
    trains = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_adapter = {id(p): (a.method, layer) for _, layer, a in _adapters(model) for _, p in parameters_of(a)}
    modules = dict(model.named_modules())
    counts: dict[tuple[str, str], int] = {}
    for name, parameter in trains:
        selected_by = record.selected.get(name, "unfrozen since"), modules[name.rpartition(".")[0]]
        method, layer = by_adapter.get(id(parameter), selected_by)
        counts[method, type(layer).__name__] = counts.get((method, type(layer).__name__), 0) + parameter.numel()
    order = [*record.methods, "head", "unfrozen since"]
    ordered = sorted(counts, key=lambda key: order.index(key[0]))
    saved = {**dict(own_state(model)), **dict(trained_tensors(model, record))}
    return Report(
        method=record.name,
        model=type(model).__name__,
        trainable=sum(p.numel() for _, p in trains),
        total=sum(p.numel() for p in model.parameters()),
        head=sum(p.numel() for name, p in trains if record.selected.get(name) == "head"),
        checkpoint_bytes=sum(t.numel() * t.element_size() for t in saved.values()),
        rows=[Row(method, "", kind, counts[method, kind]) for method, kind in ordered],
        warnings=_oversized(model),
        costs=None if example_input is None else costs(model, example_input),
        full_costs=None if example_input is None else full_costs(model, example_input),
    )


def _compared(adapted: Costs | None, full: Costs | None) -> list[str]:
    """One line for each kind of cost, beside that of full fine-tuning."""
    if adapted is None or full is None:
        return []

    def line(label: str, a: int, b: int, size: float, unit: str) -> str:
        return f"{label} {a / size:,.4g} {unit}, {100 * a / max(b, 1):.0f}% of full fine-tuning's {b / size:,.4g}"

    return [
        line("forward", adapted.forward_flops, full.forward_flops, 1e9, "GFLOPs"),
        line("forward and backward", adapted.training_flops, full.training_flops, 1e9, "GFLOPs"),
        line("saved for backward", adapted.saved_bytes, full.saved_bytes, 2**20, "MiB"),
    ]


def _adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter]]:
    for name, layer, adapters in adapted_layers(model):
        for adapter in [a for _, a in adapters.adapters()]:
            yield name, layer, adapter


def _oversized(model: nn.Module) -> list[str]:
    """One sentence for each adapter that is larger than its layer, at most five."""
    found = []
    for name, layer, adapter in _adapters(model):
        size = sum(p.numel() for _, p in parameters_of(adapter) if p.requires_grad)
        own = sum(p.numel() for name, p in layer.named_parameters() if not name.startswith("adapters."))
        if size > own:
            found.append(f"{adapter.method} has {size:,} parameters at {name}, a {type(layer).__name__} of {own:,}")
    more = [f"{len(found) - 5} more adapters are larger than their layers"] if len(found) > 5 else []
    return found[:5] + more
