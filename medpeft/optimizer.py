"""Parameter groups for any optimizer: what to decay, and at which rate to learn it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapters.adapter import parameters_of
from .adapters.record import adapted_layers, require_applied
from .adapters.registry import find
from .errors import require
from .sharding import reshard


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.0, head_lr: float | None = None, lora_plus: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters of an adapted model, in groups for any torch optimizer.

    Biases, norms, scales and everything else with fewer than two axes longer than one get no weight decay: decay pulls a
    scale to zero, where the layer computes nothing.

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
    """
    require(lr > 0 and lora_plus > 0, f"lr={lr!r} and lora_plus={lora_plus!r} must be above 0.")
    record = require_applied(model)
    reshard(model)
    fast, still = set(), set()
    for _, _, adapters in adapted_layers(model):
        for adapter in [a for _, a in adapters.adapters()]:
            fast |= {id(p) for name, p in adapter.named_parameters() if name in find(adapter.method).fast}
            still |= set() if find(adapter.method).decays else {id(p) for _, p in parameters_of(adapter)}
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = "head" if record.selected.get(name) == "head" else "fast" if id(parameter) in fast else "body"
        rate = {"head": lr if head_lr is None else head_lr, "fast": lr * lora_plus, "body": lr}[part]
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        decay = weight_decay if is_matrix and id(parameter) not in still else 0.0
        groups.setdefault((part, rate, decay), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay, "name": part if decay else f"{part}, not decayed"}
        for (part, rate, decay), params in groups.items()
    ]
