"""LoRA to and from the files of diffusers."""

from __future__ import annotations

import os

from torch import nn

from ..adapters.record import require_applied
from ..checkpoint.file import parse, write
from ..errors import CheckpointError
from ..sharding import is_first
from .matrices import Factors, apply_factors, exported
from .pairs import _number, _paired, _read, _scale

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")


def to_diffusers(model: nn.Module, path: str | os.PathLike[str], *, component: str = "unet") -> None:
    """Write a model adapted by `lora` as diffusers' LoRA file; `pipeline.load_lora_weights(path)` then computes the same.

    Args:
        model: A denoiser or text encoder after `apply(model, "lora", head=None, …)`.
        path: The file, `*.safetensors`.
        component: Name of the model in the pipeline; the prefix of every key.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the format cannot express something; each is named, with the reason, and nothing is written.
    """
    factors = exported(model, require_applied(model), with_head=False)
    tensors = {}
    for name, f in factors.items():
        tensors[f"{component}.{name}.lora_A.weight"] = f.A
        tensors[f"{component}.{name}.lora_B.weight"] = f.B * f.scale  # Without an alpha, diffusers takes a factor of 1.
    if is_first(p for p in model.parameters()):
        write(os.fspath(path), tensors, {"format": "pt"})


def from_diffusers(model: nn.Module, path: str | os.PathLike[str], *, component: str = "unet") -> nn.Module:
    """Apply `lora` to a denoiser or text encoder and load what diffusers saved.

    Args:
        model: The base, not adapted.
        path: A safetensors file of `save_lora_weights` or `save_lora_adapter`.
        component: Name of the model in the pipeline; keys of other components are left to them.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is damaged, has nothing for this component, or holds what LoRA here does not compute. The
            model is untouched.
    """
    name = os.fspath(path)
    tensors, metadata = _read(name)
    config = parse(metadata.get("lora_adapter_metadata", "{}"), f"the metadata of {name}")
    prefix = f"{component}." if any(key.startswith(f"{component}.") for key in tensors) else ""
    own = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    config = {k.removeprefix(prefix): v for k, v in config.items() if k.startswith(prefix)} if isinstance(config, dict) else {}
    first = next(iter(own), "").partition(".")[0]
    if not prefix and first in _COMPONENTS and not hasattr(model, first):
        raise CheckpointError(f"{name} has nothing for component={component!r}: its keys begin with {first!r}.")
    alphas = {key.removesuffix(".alpha"): _number(own.pop(key), key) for key in list(own) if key.endswith(".alpha")}
    pairs, rest = _paired(own, name)
    factors = {}
    for layer, (A, B) in pairs.items():
        scale = _scale(config, layer, A.shape[0]) if "lora_alpha" in config else alphas.get(layer, A.shape[0]) / A.shape[0]
        factors[layer] = Factors(A, B, scale)
    return apply_factors(model, factors, rest, name, head=None, dropout=0.0)
