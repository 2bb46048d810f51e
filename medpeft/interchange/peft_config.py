"""adapter_config.json of Hugging Face's peft: described, read, and refused where it asks for more."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapters.by_place import at
from ..adapters.record import Adapted
from ..checkpoint.file import MAX_HEADER, parse
from ..checkpoint.messages import clip
from ..checkpoint.source import opened
from ..errors import CheckpointError
from .changes import Change

KINDS = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
"""Our name of each peft_type that is read."""

# Options with which peft computes something that `lora` does not. `fan_in_fan_out` is none of them: whatever
# the file says, peft sets it to True for a `Conv1D` of transformers and to False for a linear layer.
_REFUSED = (
    "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora", "use_bdlora",
    "alora_invocation_tokens", "megatron_config", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip

# Starts that leave the base as it is, so that the file's A and B say everything.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")

# Characters that make a regular expression of a name.
_OPERATORS = frozenset("*+?[](){}|\\$")


def describe(adapted: Adapted, changes: Mapping[str, Change]) -> dict[str, Any]:
    """Describe changes of one method to peft.

    It takes the most frequent rank and its α, and a pattern for each layer that differs.
    """
    method = next(iter(changes.values())).method
    options = adapted.record.methods[method]
    ranks = {name: change.rank for name, change in changes.items()}
    if method == "lokr":
        # Which factors are whole follows from the rank that was asked for.
        ranks = {name: at(options, name)["rank"] for name in changes}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {name: change.scale * ranks[name] for name, change in changes.items()}
    alpha = next(alphas[name] for name in changes if ranks[name] == rank)
    config: dict[str, Any] = {
        "peft_type": method.upper(),
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "target_modules": _target_modules(adapted.model, list(changes)),
        "modules_to_save": list(adapted.record.head) or None,
        "rank_pattern": _exceptions(ranks, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
    }
    if method == "lora":
        return config | _options_of_lora(adapted, options, alpha)
    config["alpha"] = alpha
    config["use_effective_conv2d"] = options["tucker"]
    if method == "lokr":
        config["decompose_both"] = options["both"]
        config["decompose_factor"] = options["factor"]
    return config


def _options_of_lora(adapted: Adapted, options: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    """Describe what peft asks of LoRA alone."""
    bias = "none"
    if not {"bias", "bitfit"}.isdisjoint(adapted.record.methods):
        bias = "all"
    described: dict[str, Any] = {
        "lora_alpha": alpha,
        "lora_dropout": options["dropout"],
        "bias": bias,
        "use_rslora": False,
        "use_dora": options["dora"],
        "fan_in_fan_out": False,
    }
    if options["bias"]:  # Releases of peft before 0.14 know no such option.
        described["lora_bias"] = True
    return described


def _target_modules(model: nn.Module, layers: list[str]) -> list[str] | str:
    """Name the layers as peft reads them.

    peft takes every module whose name ends in a listed one. Where that would be too many, the names form one
    expression, which has to match the whole name of a module.
    """
    endings = tuple(f".{layer}" for layer in layers)
    for name, _ in model.named_modules():
        if name.endswith(endings) and name not in layers:
            return "|".join(map(_escaped, layers))
    return layers


def _exceptions(values: Mapping[str, float], common: float) -> dict[str, float]:
    """Take the values that differ from the common one, by an expression that matches their layer alone."""
    return {f"^{_escaped(name)}": value for name, value in values.items() if value != common}


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def read_configuration(path: str) -> dict[str, Any]:
    """Read peft's configuration, and refuse one that asks for more than LoRA, LoHa or LoKr."""
    with opened(path) as file:
        config = parse(file.read(MAX_HEADER), path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            f"{path} is of peft_type {clip(repr(kind))}; medpeft reads {', '.join(KINDS)}. Merge it into the "
            "weights with peft (merge_and_unload), and load these."
        )
    refused = _refused_options(config)
    if refused:
        raise CheckpointError(
            f"{path} asks for what {KINDS[kind]!r} here does not compute: {clip(', '.join(refused))}."
        )
    return dict(config)


def _refused_options(config: Mapping[str, Any]) -> list[str]:
    """List the options with which peft computes something else than LoRA."""
    refused = [f"{key}={config[key]!r}" for key in _REFUSED if config.get(key)]
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        refused.append(f"{bias=}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        hint = "peft changes the base then: save with path_initial_model_for_weight_conversion"
        refused.append(f"init_lora_weights={start!r} ({hint})")
    return refused


def scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """Compute the factor of a layer's change from peft's configuration: α/r, or α/√r with `use_rslora`.

    Args:
        config: The configuration.
        layer: Name of the layer.
        rank: r by the layer's tensors; 0 where they have none, then the configuration's.

    Raises:
        CheckpointError: α or r is no number, or a pattern has an expression in place of a name.
    """
    divisor: float = rank
    if not rank:
        divisor = _number(_by_pattern(config, "rank_pattern", layer, config.get("r")), "r", layer)
    if divisor <= 0:
        raise CheckpointError(f"r={divisor!r} of {layer!r} is no rank.")
    common = config.get("lora_alpha", config.get("alpha", rank))
    alpha = _number(_by_pattern(config, "alpha_pattern", layer, common), "lora_alpha", layer)
    if config.get("use_rslora"):
        divisor = math.sqrt(divisor)
    return alpha / divisor


def _number(value: Any, what: str, layer: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"{what}={clip(repr(value))} of {layer!r} is no number.")
    return value


def _by_pattern(config: Mapping[str, Any], key: str, layer: str, common: Any) -> Any:
    """Find the value of a layer: that of the first pattern that names it, else the one of all layers."""
    patterns = config.get(key)
    if isinstance(patterns, dict):
        for pattern, value in patterns.items():
            if _names(pattern, layer, key):
                return value
    return common


def _names(pattern: str, layer: str, key: str) -> bool:
    """Whether peft's pattern names the layer.

    peft takes it for a regular expression. Here it has to be a name: an expression could run for ever.
    """
    name = pattern.removeprefix("^").replace("\\.", ".")
    if not _OPERATORS.isdisjoint(name):
        raise CheckpointError(
            f"{key} has the expression {clip(repr(pattern))}; medpeft reads names of layers alone."
        )
    if layer == name:
        return True
    return not pattern.startswith("^") and layer.endswith(f".{name}")
