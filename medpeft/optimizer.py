"""Parameter groups for any optimizer: what to decay, and at which rate to learn it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from torch import nn

from .adapters.adapter import parameters_of
from .adapters.options import Must, require_options
from .adapters.record import Adapted
from .adapters.registry import find
from .errors import require
from .sharding import reshard

_Rate = Annotated[float, Must("be a finite number, 0 or above", lambda rate: rate >= 0)]
_RATES = {"lr": float, "weight_decay": _Rate, "head_lr": _Rate | None, "lora_plus": float}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    head_lr: float | None = None,
    lora_plus: float = 1.0,
) -> list[dict[str, Any]]:
    """Group the trainable parameters of an adapted model for any torch optimizer.

    Matrices get weight decay: parameters with at least two axes longer than one. Biases, norms and scales get
    none, because decay pulls a scale to zero, where the layer computes nothing.

    Args:
        model: A model after `apply`.
        lr: Learning rate.
        weight_decay: Weight decay of the matrices.
        head_lr: Learning rate of the head; `lr` if None.
        lora_plus: λ of LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B learns at λ·lr.

    Returns:
        Groups with "params", "lr", "weight_decay" and "name", none of them empty.

    Raises:
        MedpeftError: nothing was applied, or a rate is not positive.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = medpeft.apply(model, "lora", target="0", head="1")
        >>> groups = medpeft.parameter_groups(model, lr=0.001, weight_decay=0.1, lora_plus=16)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('body', 0.001), ('fast', 0.016), ('head', 0.001), ('head, not decayed', 0.001)]
        >>> optimizer = torch.optim.AdamW(groups)
    """
    _require_rates(lr=lr, weight_decay=weight_decay, head_lr=head_lr, lora_plus=lora_plus)
    adapted = Adapted.of(model)
    reshard(model)
    if head_lr is None:
        head_lr = lr
    rates = {"body": lr, "fast": lr * lora_plus, "head": head_lr}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for part, is_decayed, parameter in _trainable(adapted):
        decay = weight_decay if is_decayed else 0.0
        groups.setdefault((part, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": decay, "name": _name(part, decay)}
        for (part, decay), parameters in groups.items()
    ]


def _require_rates(*, lr: float, lora_plus: float, **others: float | None) -> None:
    """Raise `MedpeftError` unless the rates are finite, and those that must be are above 0."""
    require_options("", {"lr": lr, "lora_plus": lora_plus, **others}, _RATES)
    require(lr > 0 and lora_plus > 0, f"lr={lr!r} and lora_plus={lora_plus!r} must be above 0.")


def _name(part: str, decay: float) -> str:
    if decay:
        return part
    return f"{part}, not decayed"


def _trainable(adapted: Adapted) -> Iterator[tuple[str, bool, nn.Parameter]]:
    """List every trainable parameter with its part ("head", "fast" or "body"), and whether it decays."""
    fast: set[int] = set()
    undecayed: set[int] = set()
    for _, _, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            method = find(adapter.method)
            for name, parameter in parameters_of(adapter):
                if name in method.fast:
                    fast.add(id(parameter))
                if not method.decays:
                    undecayed.add(id(parameter))
    for name, parameter in adapted.model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "body"
        if adapted.record.selected.get(name) == "head":
            part = "head"
        elif id(parameter) in fast:
            part = "fast"
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        yield part, is_matrix and id(parameter) not in undecayed, parameter
