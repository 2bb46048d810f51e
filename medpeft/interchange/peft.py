"""LoRA, LoHa and LoKr to and from the files of Hugging Face's peft: the same changes, in peft's words.

Format: adapter_model.safetensors and adapter_config.json, as `PeftModel.save_pretrained` of peft 0.21 writes
them. peft itself is not needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.aside import recovered
from ..adapters.record import Adapted, require_applied
from ..adapters.running import switching
from ..architecture.head import Head
from ..architecture.layers import CONVS
from ..checkpoint.messages import clip
from ..checkpoint.save import plain
from ..checkpoint.source import path_of
from ..checkpoint.writing import unfinished_in, write
from ..errors import CheckpointError
from ..sharding import is_first
from .changes import Change, parts_of
from .formats import PEFT, attention_around
from .lora_file import LoRAFile, read, sort
from .matrices import Factors
from .peft_config import KINDS, describe, read_configuration, scale
from .transfer import apply_file, export

_PREFIX = "base_model.model."
_TENSORS = "adapter_model.safetensors"
_CONFIGURATION = "adapter_config.json"

# The projection that peft adapts within an adapted attention.
_OUT = ".base_layer.out_proj"

# peft 0.21 adds the change of that projection twice: in `MultiheadAttention.merge`, and by the merge of the
# projection itself that is called there. So the attention computes with B·A doubled, in training as well.
_TIMES = 2.0

_LORA = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
}
_EMBEDDING = {"A": "lora_embedding_B", "B": "lora_embedding_A"}


def to_peft(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write a model adapted by `lora`, `loha` or `lokr` as peft does.

    The files are adapter_model.safetensors and adapter_config.json, with which
    `PeftModel.from_pretrained(base, directory)` computes the same. Where q, k and v are one layer, its parts
    become one LoRA of the sum of their ranks, with a block-diagonal B. PiSSA and OLoRA become one of twice
    the rank. The head goes into `modules_to_save`.

    Args:
        model: A model after `apply(model, "lora", …)`, or `load`; adapted by one of these methods.
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
    directory = path_of(model, directory)
    require_applied(model)
    with switching(model, "to_peft"):  # So that no other thread puts another head in meanwhile.
        adapted = recovered(model, "to_peft")
        changes = _with_whole_attentions(model, _of_one_method(export(adapted, PEFT)))
        targets = {name: change for name, change in changes.items() if _OUT not in name}
        tensors = _renamed(model, changes) | _trained(adapted, targets)
        config = describe(adapted, targets)
        if is_first(model.parameters()):
            _write_both(directory, tensors, config)


def _of_one_method(changes: dict[str, Change]) -> dict[str, Change]:
    """Refuse changes of several methods."""
    methods = sorted({change.method for change in changes.values()})
    if len(methods) > 1:
        raise CheckpointError(f"The model has {' and '.join(methods)}, and a file of peft holds one method.")
    return changes


def _with_whole_attentions(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Change]:
    """Give both projections of an `nn.MultiheadAttention` a LoRA of one rank and a factor of 1, as peft does.

    A projection that is not adapted gets one of zeros.
    """
    complete = dict(changes)
    for name in changes:
        attention = model.get_submodule(attention_around(name))
        if not isinstance(attention, nn.MultiheadAttention):
            continue
        name = attention_around(name)
        inner, outer = f"{name}.out_proj", f"{name}{_OUT}"
        if outer in complete:
            continue
        entering, leaving = complete.pop(name, None), complete.pop(inner, None)
        rank = max(change.rank for change in (entering, leaving) if change is not None)
        assert attention.in_proj_weight is not None
        complete[name] = _of_rank(rank, entering, attention.in_proj_weight)
        complete[outer] = _of_rank(rank, leaving, attention.out_proj.weight, 1 / _TIMES)
    return complete


def _of_rank(rank: int, change: Change | None, weight: Tensor, times: float = 1.0) -> Factors:
    """Fill a LoRA up with zeros to a rank, its factor and another one in B; without one, with zeros alone."""
    outputs, inputs = weight.shape
    A, B = torch.zeros(rank, inputs, dtype=weight.dtype), torch.zeros(outputs, rank, dtype=weight.dtype)
    if isinstance(change, Factors):
        A, B = A.to(change.A.dtype), B.to(change.B.dtype)
        A[: change.rank] = change.A
        B[:, : change.rank] = change.B * (change.scale * times)
    return Factors(A, B, 1.0)


def _renamed(model: nn.Module, changes: Mapping[str, Change]) -> dict[str, Tensor]:
    """Name every tensor of the changes as peft does."""
    tensors = {}
    for name, change in changes.items():
        layer = model.get_submodule(name.replace(".base_layer.", "."))
        for part, tensor in parts_of(change).items():
            key = _LORA.get(part, part)
            if isinstance(layer, nn.Embedding):
                key = _EMBEDDING[part]
                tensor = tensor.t().contiguous()  # (dim, r) and (r, rows)
            elif part == "magnitude" and isinstance(layer, CONVS):
                tensor = tensor.view(1, -1, *[1] * (layer.weight.ndim - 2))  # (out,) → (1, out, 1 …)
            elif part.startswith(("hada_t", "lokr_t")) and tensor.ndim == 3:
                tensor = tensor[..., None]  # (r, r, kernel) → (r, r, kernel, 1)
            tensors[f"{_PREFIX}{name}.{key}"] = tensor
    return tensors


def _trained(adapted: Adapted, targets: Mapping[str, Change]) -> dict[str, Tensor]:
    """Copy the tensors of the head and the trained biases, named as peft does."""
    model, tensors = adapted.model, {}
    for module in adapted.record.head:
        for name, tensor in model.get_submodule(module).state_dict(prefix=f"{module}.").items():
            tensors[f"{_PREFIX}{name}"] = plain(tensor).clone()
    for name, tensor in adapted.trained.items():
        if adapted.record.selected.get(name) != "head":
            tensors[f"{_PREFIX}{_below_wrappers(name, targets)}"] = plain(tensor).clone()
    return tensors


def _below_wrappers(name: str, targets: Mapping[str, Change]) -> str:
    """Name a bias as in peft's model, where an adapted layer is `base_layer` within a wrapper."""
    layer, _, bias = name.rpartition(".")
    attention = attention_around(layer)
    if layer in targets:
        return f"{layer}.base_layer.{bias}"
    if attention in targets:
        return f"{attention}{_OUT}.base_layer.{bias}"
    return name


def _write_both(directory: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors and configuration: neither, if one of them cannot be written.

    The configuration is written beside first; it gets its name once the tensors are there.
    """
    path = os.path.join(directory, _CONFIGURATION)
    try:
        if os.path.isdir(path):
            raise CheckpointError(f"{path} is no file that can be written over.")
        with unfinished_in(directory) as unfinished:
            with open(unfinished, "x", encoding="utf-8") as file:
                json.dump(config, file, indent=2)
            write(os.path.join(directory, _TENSORS), tensors, {"format": "pt"})
            os.replace(unfinished, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def from_peft(
    model: nn.Module, directory: str | os.PathLike[str], *, head: Head = "auto", dropout: float | None = None
) -> nn.Module:
    """Apply `lora`, `loha` or `lokr` to a base and load adapter_model.safetensors and adapter_config.json.

    Every layer gets its own rank. Its factor is multiplied into B of LoRA, B₁ of LoHa or C of LoKr, so that
    all layers have one factor. Where q, k and v are one layer, each part gets its own copy of LoRA's A.

    Args:
        model: The base, not adapted.
        directory: Where peft saved.
        head: As in `apply`; modules that the file holds whole must lie in it.
        dropout: As in `lora`; None takes the file's.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the files are damaged, or hold what medpeft does not compute; each reason is given.
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
    directory = path_of(model, directory)
    config = read_configuration(os.path.join(directory, _CONFIGURATION))
    file = _read_file(os.path.join(directory, _TENSORS), config)
    _require_as_configured(file, config)
    return apply_file(model, file, PEFT, head=head, options=_options(file, config, dropout))


def _options(file: LoRAFile, config: Mapping[str, Any], dropout: float | None) -> dict[str, dict[str, Any]]:
    """Name the options that come from peft's configuration, and the biases that it trained."""
    options: dict[str, dict[str, Any]] = {}
    if config["peft_type"] == "LORA":
        if dropout is None:
            dropout = config.get("lora_dropout", 0.0)
        options["lora"] = {"dropout": dropout}
    bias = config.get("bias", "none")
    if bias == "all":
        options["bias"] = {}
    elif bias == "lora_only":
        options["bias"] = {"target": lambda name, layer: name in file.changes}
    return options


def _read_file(path: str, config: Mapping[str, Any]) -> LoRAFile:
    """Read peft's tensors, and name them as in the model."""
    tensors = {}
    for key, tensor in read(path)[0].items():
        tensors[key.removeprefix(_PREFIX).replace(".modules_to_save.default.", ".")] = tensor
    file = sort(path, tensors, partial(_scale, config), (KINDS[config["peft_type"]],))
    changes = {_without_wrappers(name): change for name, change in file.changes.items()}
    others = {_without_wrappers(name): tensor for name, tensor in file.others.items()}
    return LoRAFile(path, changes, others)


def _scale(config: Mapping[str, Any], layer: str, rank: int, alpha: float | None) -> float:
    """Compute the factor with which peft adds a layer's change, one within an attention included."""
    factor = scale(config, layer.partition(".base_layer.")[0], rank)
    if layer.endswith(_OUT):
        return factor * _TIMES
    return factor


def _require_as_configured(file: LoRAFile, config: Mapping[str, Any]) -> None:
    """Refuse a file whose configuration and tensors disagree about DoRA or about biases."""
    for layer, change in file.changes.items():
        parts = parts_of(change)
        for part, option in (("magnitude", "use_dora"), ("bias", "lora_bias")):
            expected = bool(config.get(option))
            if (part in parts) == expected:
                continue
            count = "no"
            if part in parts:
                count = "a"
            raise CheckpointError(
                f"{file.name}: the configuration says {option}={expected}, and {clip(layer)!r} has {count} "
                f"{_LORA[part]}."
            )


def _without_wrappers(name: str) -> str:
    return name.replace(".base_layer.", ".")
