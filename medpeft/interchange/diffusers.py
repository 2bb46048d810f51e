"""LoRA to and from the files of diffusers.

Format: one safetensors file of `save_lora_adapter` or `save_lora_weights` in diffusers 0.42. Keys of older
releases are read, too. diffusers itself is not needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from ..adapters.aside import recovered
from ..checkpoint.file import parse
from ..checkpoint.messages import clip
from ..checkpoint.source import path_of
from ..checkpoint.writing import write
from ..errors import CheckpointError, listed
from ..sharding import is_first
from .formats import DIFFUSERS
from .lora_file import LoRAFile, read, sort
from .matrices import Factors
from .peft_config import scale
from .transfer import apply_file, export

# Models of a pipeline, by which the keys of a file may begin.
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")

# Keys of older releases, by which an attention held all LoRA of its projections.
_OF_PROCESSORS = re.compile(
    r"(\w+)(?:\.processor)?\.to_(q|k|v|out)_(lora\.(?:down\.weight|up\.weight|alpha))$"
)

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
    path, tensors = path_of(model, path), {}
    for name, change in export(recovered(model, "to_diffusers"), DIFFUSERS).items():
        assert isinstance(change, Factors)
        tensors[f"{component}.{name}.lora_A.weight"] = change.A
        # Without an alpha, diffusers takes a factor of 1.
        tensors[f"{component}.{name}.lora_B.weight"] = change.B * change.scale
        if change.magnitude is not None:
            norms = change.magnitude
            if change.A.ndim > 2:
                norms = norms.view(1, -1, *[1] * (change.A.ndim - 2))  # (out,) → (1, out, 1 …)
            tensors[f"{component}.{name}.lora_magnitude_vector.weight"] = norms
    if is_first(model.parameters()):
        write(path, tensors, {"format": "pt"})


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
    return apply_file(model, _read_file(model, path_of(model, path), component), DIFFUSERS)


def _read_file(model: nn.Module, path: str, component: str) -> LoRAFile:
    """Read the tensors of a component from a file; all of them if its keys name no component."""
    tensors, metadata = read(path)
    prefix = f"{component}."
    if not any(key.startswith(prefix) for key in tensors):
        prefix = ""
        _require_no_component(model, path, component, tensors)
    config = _below(prefix, _configuration(metadata, path))
    tensors = _renamed(model, _below(prefix, tensors), path)
    if "lora_alpha" in config:
        return sort(path, tensors, lambda layer, rank, alpha: scale(config, layer, rank), DIFFUSERS.methods)
    return sort(path, tensors, _scale, DIFFUSERS.methods)


def _require_no_component(model: nn.Module, path: str, component: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a file whose keys begin with the names of other models of a pipeline, or in kohya's way."""
    firsts = {key.partition(".")[0] for key in tensors}
    others = sorted(first for first in firsts if first in _COMPONENTS and not hasattr(model, first))
    if others:
        raise CheckpointError(
            f"{path} has nothing for component={component!r}: its keys begin with {listed(others)}. Pass "
            f"component={others[0]!r} together with that model of the pipeline."
        )
    if any(first.startswith(("lora_unet_", "lora_te", "lycoris_")) for first in firsts):
        raise CheckpointError(f"{path} is a file of kohya's scripts or LyCORIS: read it by from_kohya.")


def _renamed(model: nn.Module, tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Name tensors as today's diffusers does, where a file has the keys of older releases."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = _OF_PROCESSORS.sub(_by_layer, key)
        name = _as_in(model, name)
        if name in renamed:
            raise CheckpointError(f"{path} holds {clip(repr(name))} twice, by two spellings.")
        renamed[name] = tensor
    return renamed


def _by_layer(match: re.Match[str]) -> str:
    """Name the projection of a text encoder or of a denoiser that an older key of its attention names."""
    attention, projection, rest = match.groups()
    names = {"out": "to_out.0"}
    if attention == "self_attn":
        names = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}
    return f"{attention}.{names.get(projection, f'to_{projection}')}.{rest}"


def _as_in(model: nn.Module, name: str) -> str:
    """Name a tensor below `text_model` where the text encoder has that module, as before transformers 5."""
    below = name.removeprefix("text_model.")
    if hasattr(model, "text_model"):
        if below.startswith(("encoder.", "embeddings.")):
            return f"text_model.{below}"
        return name
    return below


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
