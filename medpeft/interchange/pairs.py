"""The tensors of another library's LoRA file: pairs of A and B, and the factor of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..checkpoint.file import read_layout, read_tensors
from ..checkpoint.source import opened
from ..errors import CheckpointError

_SPELLINGS = (("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight"))


def _read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with opened(path) as file:
        layout = read_layout(file, path)
        return read_tensors(file, layout, path), layout.metadata


def _paired(tensors: Mapping[str, Tensor], name: str) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """A and B of every layer, and what else is in the file."""
    pairs, rest = {}, dict(tensors)
    for a, b in _SPELLINGS:
        for key in [key for key in tensors if key.endswith("." + a)]:
            layer = key.removesuffix("." + a)
            if f"{layer}.{b}" in tensors:
                pairs[layer] = rest.pop(key), rest.pop(f"{layer}.{b}")
    unknown = [key for key in rest if "lora" in key.lower()]
    if unknown or not pairs:
        found = repr((unknown or list(rest) or ["nothing"])[0])
        raise CheckpointError(
            f"{name} holds {found}, which is no pair of lora_A.weight and lora_B.weight (lora.down, lora.up)."
        )
    if any(t.ndim < 2 or not t.shape[0] for pair in pairs.values() for t in pair):
        raise CheckpointError(f"{name} holds an A or B that is no matrix.")
    return pairs, rest


def _number(tensor: Tensor, key: str) -> float:
    if tensor.numel() != 1:
        raise CheckpointError(f"{key!r} is no single number but of shape {tuple(tensor.shape)}.")
    return float(tensor)


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor of a layer's B·A; patterns of names are taken as names, as an expression from a file could run for ever."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        name = pattern.removeprefix("^").replace("\\.", ".")
        if set(name) & set("*+?[](){}|\\$"):
            raise CheckpointError(f"alpha_pattern has the expression {pattern!r}; medpeft reads names of layers alone.")
        if layer == name or (not pattern.startswith("^") and layer.endswith("." + name)):
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha={alpha!r} of {layer!r} is no number.")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
