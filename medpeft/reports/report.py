"""Numbers of trainable parameters: a table per method and per layer type."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ..adapters import by_place
from ..adapters.adapter import parameters_of
from ..adapters.record import Adapted
from ..table import Row, Table, heading
from .costs import Costs, costs, full_costs


@dataclass
class Report:
    """The result of `report`. Print it.

    Attributes:
        method: The methods, as "bias+norm".
        model: The class of the model.
        depth: Share of the model's blocks in which layers were taken, the last ones.
        trainable: Parameters that train, the head's included.
        total: All parameters, the adapters' included.
        head: Parameters of the head that train.
        checkpoint_bytes: Bytes of the tensors that `save` writes.
        rows: Trainable parameters per method and layer type, the head apart.
        warnings: Layers whose adapter is larger than they are.
        by_place: One line for each option that layers have values of their own of.
        costs: Costs of one training step on the example input, None without one.
        full_costs: The same for full fine-tuning, without adapters.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> print(medpeft.report(medpeft.apply(model, "ssf", head="2")))
        ssf on Sequential
        --------------------------
        method  type    parameters
        --------------------------
        ssf     Linear          16
        head    Linear          18
        --------------------------
        total                   34
        trainable 34 of 74 parameters (45.95%), 18 of them in the head; checkpoint 136 bytes
    """

    method: str
    model: str
    depth: float
    trainable: int
    total: int
    head: int
    checkpoint_bytes: int
    rows: list[Row]
    warnings: list[str]
    by_place: list[str] = field(default_factory=list)
    costs: Costs | None = None
    full_costs: Costs | None = None

    @property
    def percent(self) -> float:
        """Trainable parameters in percent of all."""
        return 100.0 * self.trainable / max(self.total, 1)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dicts."""
        return {**asdict(self), "percent": self.percent}

    def to_markdown(self) -> str:
        """The report as GitHub Markdown."""
        return self._table().to_markdown()

    def __str__(self) -> str:
        return str(self._table())

    def _table(self) -> Table:
        size = (
            f"trainable {self.trainable:,} of {self.total:,} parameters ({self.percent:.4g}%), "
            f"{self.head:,} of them in the head"
        )
        notes = [f"{size}; checkpoint {self.checkpoint_bytes:,} bytes"]
        if self.costs is not None and self.full_costs is not None:
            notes += _compared(self.costs, self.full_costs)
        notes += self.by_place
        for warning in self.warnings:
            notes.append(f"warning: {warning}")
        title = heading(self.method, self.model, self.depth)
        return Table(title, self.rows, ("method", "type", "parameters"), notes)


def report(model: nn.Module, example_input: Any = None) -> Report:
    """Count the parameters that an adapted model trains, per method and layer type, the head apart.

    Args:
        model: A model after `apply`.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs. With it, the operations of
            a training step and the memory that it keeps for backward are counted too, beside those of full
            fine-tuning. Nothing is computed.

    Raises:
        MedpeftError: nothing was applied, or the model cannot run without values, as the message explains.

    Examples:
        >>> import torch, medpeft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = medpeft.report(medpeft.apply(model, "bias", head="2"))
        >>> report.trainable, report.total, report.head
        (26, 58, 18)
    """
    adapted = Adapted.of(model)
    rows = _rows(adapted)
    step, full_step = None, None
    if example_input is not None:
        step, full_step = costs(model, example_input), full_costs(model, example_input)
    return Report(
        method=adapted.record.name,
        model=type(model).__name__,
        depth=adapted.record.depth,
        trainable=sum(row.parameters for row in rows),
        total=sum(parameter.numel() for parameter in model.parameters()),
        head=sum(row.parameters for row in rows if row.method == "head"),
        checkpoint_bytes=sum(tensor.numel() * tensor.element_size() for tensor in adapted.saved.values()),
        rows=rows,
        warnings=_oversized(adapted),
        by_place=by_place.notes(adapted.record.methods),
        costs=step,
        full_costs=full_step,
    )


def _rows(adapted: Adapted) -> list[Row]:
    """One row for each method and layer type, in the order of the methods."""
    method_and_layer: dict[int, tuple[str, str]] = {}
    for _, layer, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            for _, parameter in parameters_of(adapter):
                method_and_layer[id(parameter)] = adapter.method, type(layer).__name__
    counts: Counter[tuple[str, str]] = Counter()
    for name, parameter in adapted.model.named_parameters():
        if parameter.requires_grad:
            owner = adapted.model.get_submodule(name.rpartition(".")[0])
            selected_by = adapted.record.selected.get(name, "unfrozen since")
            key = method_and_layer.get(id(parameter), (selected_by, type(owner).__name__))
            counts[key] += parameter.numel()
    rows = []
    for method in (*adapted.record.methods, "head", "unfrozen since"):
        for (by, kind), count in counts.items():
            if by == method:
                rows.append(Row(method, "", kind, count))
    return rows


def _compared(step: Costs, full_step: Costs) -> list[str]:
    """One line for each kind of cost, beside that of full fine-tuning."""
    return [
        _compared_line("forward", step.forward_flops, full_step.forward_flops, 1e9, "GFLOPs"),
        _compared_line("forward and backward", step.training_flops, full_step.training_flops, 1e9, "GFLOPs"),
        _compared_line("saved for backward", step.saved_bytes, full_step.saved_bytes, 2**20, "MiB"),
    ]


def _compared_line(label: str, cost: int, full_cost: int, size: float, unit: str) -> str:
    percent = 100 * cost / max(full_cost, 1)
    return f"{label} {cost / size:,.4g} {unit}, {percent:.0f}% of full fine-tuning's {full_cost / size:,.4g}"


def _oversized(adapted: Adapted) -> list[str]:
    """One sentence for each adapter that is larger than its layer, at most five."""
    sentences = []
    for name, layer, adapters in adapted.layers:
        layer_size = 0
        for path, parameter in layer.named_parameters():
            if not path.startswith("adapters."):
                layer_size += parameter.numel()
        for _, adapter in adapters.adapters():
            size = 0
            for _, parameter in parameters_of(adapter):
                if parameter.requires_grad:
                    size += parameter.numel()
            if size > layer_size:
                layer_text = f"a {type(layer).__name__} of {layer_size:,}"
                sentences.append(f"{adapter.method} has {size:,} parameters at {name}, {layer_text}")
    if len(sentences) > 5:
        more = f"{len(sentences) - 5} more adapters are larger than their layers"
        return [*sentences[:5], more]
    return sentences
