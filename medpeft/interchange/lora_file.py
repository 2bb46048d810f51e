"""The LoRA file of another library: its pairs of A and B, the factor of each, and its other tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..checkpoint.file import read_layout, read_tensors
from ..checkpoint.source import opened
from ..errors import CheckpointError
from .matrices import Factors

# peft's names of A and B, and those of diffusers before it took over peft's.
_SUFFIXES = (("lora_A.weight", "lora_B.weight"), ("lora.down.weight", "lora.up.weight"))

# Characters that make a regular expression of a name.
_OPERATORS = frozenset("*+?[](){}|\\$")


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file in the names of the model.

    Attributes:
        name: Path of the file, for messages.
        factors: LoRA by name of the layer.
        others: Every other tensor, by its name in the model; those of a trained head.
    """

    name: str
    factors: dict[str, Factors]
    others: dict[str, Tensor]


def read(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors by name, and the texts beside them."""
    with opened(path) as file:
        layout = read_layout(file, path)
        return read_tensors(file, layout, path), layout.metadata


def pair_up(path: str, tensors: Mapping[str, Tensor], factor: Callable[[str, int], float]) -> LoRAFile:
    """Sort tensors into the A and B of every layer, and the others.

    `factor` computes the factor of B·A from a layer's name and rank.

    Raises:
        CheckpointError: there is no pair, an A or B is alone or no matrix, or another tensor is LoRA's.
    """
    factors: dict[str, Factors] = {}
    others = dict(tensors)
    for suffix_a, suffix_b in _SUFFIXES:
        for key in tensors:
            layer = key.removesuffix(f".{suffix_a}")
            partner = f"{layer}.{suffix_b}"
            if layer == key or partner not in tensors:
                continue
            A, B = others.pop(key), others.pop(partner)
            if not _is_matrix(A) or not _is_matrix(B):
                raise CheckpointError(f"{path} holds an A or B that is no matrix.")
            factors[layer] = Factors(A, B, factor(layer, A.shape[0]))
    unknown = [key for key in others if "lora" in key.lower()]
    if unknown or not factors:
        shown = next(iter(unknown or others), "nothing")
        names = "lora_A.weight and lora_B.weight (lora.down, lora.up)"
        raise CheckpointError(f"{path} holds {shown!r}, which is no pair of {names}.")
    return LoRAFile(path, factors, others)


def _is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has rows and, beside them, another axis."""
    return tensor.ndim >= 2 and len(tensor) > 0


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Compute the factor of a layer's B·A from peft's configuration: α/r, or α/√r with `use_rslora`.

    Raises:
        CheckpointError: α is no number, or `alpha_pattern` has an expression in place of a name.
    """
    alpha = _alpha(config, layer, rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise CheckpointError(f"lora_alpha={alpha!r} of {layer!r} is no number.")
    if config.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> Any:
    """Find α of a layer: that of the first pattern that names it, else the one of all layers."""
    patterns = config.get("alpha_pattern")
    if isinstance(patterns, dict):
        for pattern, alpha in patterns.items():
            if _names(pattern, layer):
                return alpha
    return config.get("lora_alpha", rank)


def _names(pattern: str, layer: str) -> bool:
    """Whether peft's pattern names the layer.

    peft takes it for a regular expression. Here it has to be a name: an expression could run for ever.
    """
    name = pattern.removeprefix("^").replace("\\.", ".")
    if not _OPERATORS.isdisjoint(name):
        raise CheckpointError(
            f"alpha_pattern has the expression {pattern!r}; medpeft reads names of layers alone.",
        )
    if layer == name:
        return True
    return not pattern.startswith("^") and layer.endswith(f".{name}")
