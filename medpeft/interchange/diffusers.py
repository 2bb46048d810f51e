"""LoRA to and from the files of diffusers.

Format: one safetensors file of `save_lora_adapter` or `save_lora_weights` in diffusers 0.42. Keys of older
releases are read, too. diffusers itself is not needed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..adapters.aside import recovered
from ..checkpoint.file import parse
from ..checkpoint.writing import write
from ..errors import CheckpointError
from ..sharding import is_first
from .formats import DIFFUSERS
from .lora_file import LoRAFile, read, sort
from .matrices import Factors
from .peft_config import scale
from .transfer import apply_file, export

# Models of a pipeline, by which the keys of a file may begin.
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")

Value = TypeVar("Value")


def to_diffusers(model: nn.Module, path: str | os.PathLike[str], *, component: str = "unet") -> None:
    """Write a model adapted by `lora` as a LoRA file of diffusers.

    `pipeline.load_lora_weights(path)` then computes the same.

    Args:
        model: A denoiser or text encoder after `apply(model, "lora", head=None, …)`.
        path: The file, `*.safetensors`.
        component: Name of the model in the pipeline; the prefix of every key.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the format cannot express something. Every reason is given, and nothing is written.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> from medpeft.interchange import to_diffusers
        >>> from safetensors.torch import load_file
        >>> unet = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> unet = medpeft.apply(unet, "lora", target="0", head=None, rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_diffusers(unet, f"{directory}/lora.safetensors")
        ...     print(*sorted(load_file(f"{directory}/lora.safetensors")))
        unet.0.lora_A.weight unet.0.lora_B.weight
    """
    tensors = {}
    for name, change in export(recovered(model, "to_diffusers"), DIFFUSERS).items():
        assert isinstance(change, Factors)
        tensors[f"{component}.{name}.lora_A.weight"] = change.A
        # Without an alpha, diffusers takes a factor of 1.
        tensors[f"{component}.{name}.lora_B.weight"] = change.B * change.scale
        if change.magnitude is not None:
            tensors[f"{component}.{name}.lora_magnitude_vector"] = change.magnitude
    if is_first(model.parameters()):
        write(os.fspath(path), tensors, {"format": "pt"})


def from_diffusers(model: nn.Module, path: str | os.PathLike[str], *, component: str = "unet") -> nn.Module:
    """Apply `lora` to a denoiser or text encoder and load a LoRA file of diffusers.

    Args:
        model: The base, not adapted.
        path: A safetensors file of `save_lora_weights` or `save_lora_adapter`.
        component: Name of the model in the pipeline; keys of other components are left to them.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is damaged, has nothing for this component, or holds what LoRA here does not
            compute. The model is untouched.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> from medpeft.interchange import from_diffusers, to_diffusers
        >>> unet, base = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> unet = medpeft.apply(torch.nn.Sequential(unet), "lora", target="0", head=None, rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_diffusers(unet, f"{directory}/lora.safetensors")
        ...     loaded = from_diffusers(torch.nn.Sequential(base), f"{directory}/lora.safetensors")
        >>> medpeft.report(loaded).trainable
        16
    """
    return apply_file(model, _read_file(model, os.fspath(path), component), DIFFUSERS)


def _read_file(model: nn.Module, path: str, component: str) -> LoRAFile:
    """Read the tensors of a component from a file; all of them if its keys name no component."""
    tensors, metadata = read(path)
    prefix = f"{component}."
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
        first = next(iter(tensors), "").partition(".")[0]
        if first in _COMPONENTS and not hasattr(model, first):
            missing = f"{path} has nothing for component={component!r}"
            raise CheckpointError(f"{missing}: its keys begin with {first!r}.")
    config = _below(prefix, _configuration(metadata, path))
    tensors = _below(prefix, tensors)
    if "lora_alpha" in config:
        return sort(path, tensors, lambda layer, rank, alpha: scale(config, layer, rank), DIFFUSERS.methods)
    return sort(path, tensors, _scale, DIFFUSERS.methods)


def _scale(layer: str, rank: int, alpha: float | None) -> float:
    """Compute α/r; 1 without an α."""
    if alpha is None:
        return 1.0
    return alpha / rank


def _configuration(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    """Read peft's configuration from a file's metadata, {} if there is none."""
    config = parse(metadata.get("lora_adapter_metadata", "{}"), f"the metadata of {path}")
    if not isinstance(config, dict):
        return {}
    return config


def _below(prefix: str, values: Mapping[str, Value]) -> dict[str, Value]:
    """Take the values whose names begin with a prefix, by their names without it."""
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
