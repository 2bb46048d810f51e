"""LoRA to and from the files of Hugging Face's peft and diffusers: the same change of the weights, in their words.

Formats: `PeftModel.save_pretrained` of peft 0.21 (adapter_model.safetensors and adapter_config.json); `save_lora_adapter` and
`save_lora_weights` of diffusers 0.42 (one safetensors file). Neither library is needed here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapters.record import require_applied
from ..architecture.head import Head
from ..checkpoint.file import MAX_HEADER, parse, write
from ..checkpoint.save import plain
from ..checkpoint.source import opened
from ..errors import CheckpointError
from ..sharding import is_first
from .matrices import Factors, apply_factors, exported
from .pairs import _paired, _read, _scale

_PEFT = "base_model.model."

# Options of peft that change the function in a way that no LoRA of ours computes.
_REFUSED = (
    "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "target_parameters", "trainable_token_indices",
    "use_qalora", "use_bdlora", "alora_invocation_tokens", "megatron_config", "arrow_config", "layers_to_transform",
)  # fmt: skip


def to_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model adapted by `lora` as peft's adapter_model.safetensors and adapter_config.json.

    `PeftModel.from_pretrained(base, directory)` then computes the same. Where q, k and v are one layer, its parts become one
    LoRA of the sum of their ranks, B being block-diagonal; PiSSA and OLoRA become one of twice the rank. The head goes into
    `modules_to_save`.

    Args:
        model: A model after `apply(model, "lora", …)`, or `load`.
        directory: Where to write; it must exist.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: peft's format cannot express something; each is named, with the reason, and nothing is written.
    """
    record = require_applied(model)
    factors = exported(model, record, with_head=True)
    ranks = Counter(f.rank for f in factors.values())
    rank = ranks.most_common(1)[0][0]
    alpha = next(f.scale * f.rank for f in factors.values() if f.rank == rank)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": record.methods["lora"]["dropout"],
        "target_modules": _targets(model, list(factors)),
        "modules_to_save": list(record.head) or None,
        "rank_pattern": {_exactly(n): f.rank for n, f in factors.items() if f.rank != rank},
        "alpha_pattern": {_exactly(n): f.scale * f.rank for n, f in factors.items() if f.scale * f.rank != alpha},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }
    tensors = {f"{_PEFT}{n}.lora_{k}.weight": t for n, f in factors.items() for k, t in (("A", f.A), ("B", f.B))}
    heads = (model.get_submodule(name).state_dict(prefix=f"{name}.") for name in record.head)
    tensors |= {f"{_PEFT}{name}": plain(tensor).clone() for head in heads for name, tensor in head.items()}
    if is_first(p for p in model.parameters()):
        write(os.path.join(directory, "adapter_model.safetensors"), tensors, {"format": "pt"})
        _write_json(os.path.join(directory, "adapter_config.json"), config)


def _targets(model: nn.Module, names: list[str]) -> list[str] | str:
    """The layers for peft, which takes every module that ends in a listed name; as an expression where that is too much."""
    unwanted = [n for n, _ in model.named_modules() if n not in names and any(n.endswith("." + name) for name in names)]
    return "|".join(_escaped(name) for name in names) if unwanted else names


def _exactly(name: str) -> str:
    return "^" + _escaped(name)


def _escaped(name: str) -> str:
    return name.replace(".", r"\.")


def _write_json(path: str, content: Mapping[str, Any]) -> None:
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
    """Apply `lora` to a base and load what peft saved: adapter_model.safetensors and adapter_config.json.

    A layer's own factor is multiplied into B, and smaller ranks are filled up, so that all have one rank and one factor. Where
    q, k and v are one layer, each part gets its own copy of A.

    Args:
        model: The base, not adapted.
        directory: Where peft saved.
        head: As in `apply`; what the file holds of whole modules must lie in it.
        dropout: As in `lora`; None takes the file's.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the files are damaged, or hold what LoRA here does not compute; each reason is given. The model is
            untouched.
    """
    folder = os.fspath(directory)
    config = _config(os.path.join(folder, "adapter_config.json"))
    name = os.path.join(folder, "adapter_model.safetensors")
    tensors, _ = _read(name)
    own = {key.removeprefix(_PEFT).replace(".modules_to_save.default.", "."): t for key, t in tensors.items()}
    pairs, rest = _paired(own, name)
    factors = {layer: Factors(A, B, _scale(config, layer, A.shape[0])) for layer, (A, B) in pairs.items()}
    given = config.get("lora_dropout", 0.0) if dropout is None else dropout
    return apply_factors(model, factors, rest, name, head=head, dropout=given)


def _config(path: str) -> dict[str, Any]:
    """peft's configuration; a `CheckpointError` where it asks for more than LoRA."""
    with opened(path) as file:
        config = parse(file.read(MAX_HEADER), path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise CheckpointError(f"{path} is of peft_type {kind!r}; medpeft reads LORA.")
    refused = [f"{key}={config[key]!r}" for key in _REFUSED if config.get(key)]
    if config.get("bias", "none") != "none":
        refused.append(f"bias={config['bias']!r}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        hint = "peft changes the base then: save with path_initial_model_for_weight_conversion"
        refused.append(f"init_lora_weights={start!r} ({hint})")
    if refused:
        raise CheckpointError(f"{path} asks for what 'lora' here does not compute: {', '.join(refused)}.")
    return config
