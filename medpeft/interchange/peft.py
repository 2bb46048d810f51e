"""LoRA to and from the files of Hugging Face's peft: the same change of the weights, in peft's words.

Format: adapter_model.safetensors and adapter_config.json, as `PeftModel.save_pretrained` of peft 0.21 writes
them. peft itself is not needed.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..adapters.aside import recovered
from ..adapters.record import Adapted, require_applied
from ..adapters.running import switching
from ..architecture.head import Head
from ..checkpoint.file import MAX_HEADER, parse
from ..checkpoint.save import plain
from ..checkpoint.source import opened
from ..checkpoint.writing import write
from ..errors import CheckpointError
from ..sharding import is_first
from .lora_file import LoRAFile, pair_up, read, scale
from .matrices import Factors
from .transfer import apply_file, export_factors

_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"
_CONFIGURATION = "adapter_config.json"

# Options with which peft computes something that `lora` does not.
_REFUSED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters",
    "trainable_token_indices", "use_qalora", "use_bdlora", "alora_invocation_tokens", "megatron_config",
    "arrow_config",
)  # fmt: skip

# Starts that leave the base as it is, so that the file's A and B say everything.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva")


def to_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model adapted by `lora` as peft's adapter_model.safetensors and adapter_config.json.

    `PeftModel.from_pretrained(base, directory)` then computes the same. Where q, k and v are one layer, its
    parts become one LoRA of the sum of their ranks, with a block-diagonal B. PiSSA and OLoRA become one of
    twice the rank. The head goes into `modules_to_save`.

    Args:
        model: A model after `apply(model, "lora", …)`, or `load`.
        directory: Where to write; it must exist.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: peft's format cannot express something; each reason is given. Nothing is written.

    Examples:
        >>> import os, tempfile, medpeft, torch
        >>> from medpeft.interchange import to_peft
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = medpeft.apply(model, "lora", target="0", head="1", rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_peft(model, directory)
        ...     print(*sorted(os.listdir(directory)))
        adapter_config.json adapter_model.safetensors
    """
    require_applied(model)
    with switching(model, "to_peft"):  # So that no other thread puts another head in meanwhile.
        adapted = recovered(model, "to_peft")
        factors = export_factors(adapted, with_head=True)
        tensors = _renamed(factors) | _head_tensors(model, adapted.record.head)
        config = _configuration(adapted, factors)
        if is_first(model.parameters()):
            write(os.path.join(directory, _TENSORS), tensors, {"format": "pt"})
            _write_json(os.path.join(directory, _CONFIGURATION), config)


def _renamed(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Name every A and B as peft does."""
    tensors = {}
    for name, layer in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.A
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.B
    return tensors


def _head_tensors(model: nn.Module, head: Iterable[str]) -> dict[str, Tensor]:
    """Copy the tensors of the head, named as peft does."""
    tensors = {}
    for module in head:
        for name, tensor in model.get_submodule(module).state_dict(prefix=f"{module}.").items():
            tensors[f"{_PREFIX}{name}"] = plain(tensor).clone()
    return tensors


def _configuration(adapted: Adapted, factors: Mapping[str, Factors]) -> dict[str, Any]:
    """Describe LoRA to peft: the most frequent rank and its α, and a pattern for each layer that differs."""
    ranks = Counter(layer.rank for layer in factors.values())
    rank = ranks.most_common(1)[0][0]
    alphas = {name: layer.scale * layer.rank for name, layer in factors.items()}
    alpha = next(alphas[name] for name, layer in factors.items() if layer.rank == rank)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapted.record.methods["lora"]["dropout"],
        "target_modules": _target_modules(adapted.model, list(factors)),
        "modules_to_save": list(adapted.record.head) or None,
        "rank_pattern": _exceptions({name: layer.rank for name, layer in factors.items()}, rank),
        "alpha_pattern": _exceptions(alphas, alpha),
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }


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


def _write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a file under another name beside and rename it, so that it is whole or not there."""
    unfinished = path + ".tmp"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
        os.replace(unfinished, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def from_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, head: Head = "auto", dropout: float | None = None
) -> nn.Module:
    """Apply `lora` to a base and load a LoRA of peft: adapter_model.safetensors and adapter_config.json.

    Every layer gets its own rank. Its factor is multiplied into B, so that all layers have one factor. Where
    q, k and v are one layer, each part gets its own copy of A.

    Args:
        model: The base, not adapted.
        directory: Where peft saved.
        head: As in `apply`; modules that the file holds whole must lie in it.
        dropout: As in `lora`; None takes the file's.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the files are damaged, or hold what LoRA here does not compute; each reason is given.
            The model is untouched.

    Examples:
        >>> import copy, tempfile, medpeft, torch
        >>> from medpeft.interchange import from_peft, to_peft
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = medpeft.apply(copy.deepcopy(base), "lora", target="0", head="1", rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_peft(model, directory)
        ...     loaded = from_peft(base, directory, head="1")
        >>> medpeft.report(loaded).trainable == medpeft.report(model).trainable
        True
    """
    config = _read_configuration(os.path.join(directory, _CONFIGURATION))
    file = _read_file(os.path.join(directory, _TENSORS), config)
    if dropout is None:
        dropout = config.get("lora_dropout", 0.0)
    return apply_file(model, file, head=head, dropout=dropout)


def _read_file(path: str, config: Mapping[str, Any]) -> LoRAFile:
    """Read peft's tensors, and name them as in the model."""
    tensors = {}
    for key, tensor in read(path)[0].items():
        tensors[key.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".")] = tensor
    return pair_up(path, tensors, partial(scale, config))


def _read_configuration(path: str) -> dict[str, Any]:
    """Read peft's configuration, and refuse one that asks for more than LoRA."""
    with opened(path) as file:
        config = parse(file.read(MAX_HEADER), path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise CheckpointError(f"{path} is of peft_type {kind!r}; medpeft reads LORA.")
    refused = _refused_options(config)
    if refused:
        raise CheckpointError(f"{path} asks for what 'lora' here does not compute: {', '.join(refused)}.")
    return dict(config)


def _refused_options(config: Mapping[str, Any]) -> list[str]:
    """List the options with which peft computes something else than LoRA."""
    refused = [f"{key}={config[key]!r}" for key in _REFUSED if config.get(key)]
    bias = config.get("bias", "none")
    if bias != "none":
        refused.append(f"{bias=}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _PLAIN_STARTS:
        hint = "peft changes the base then: save with path_initial_model_for_weight_conversion"
        refused.append(f"init_lora_weights={start!r} ({hint})")
    return refused
