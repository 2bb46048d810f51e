"""LoRA, LoHa and LoKr to and from the files of kohya's scripts, webui and LyCORIS.

Format: one safetensors file with keys such as `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`, as
LyCORIS 4.1 writes and reads them. None of these tools is needed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..adapters.aside import recovered
from ..architecture.head import Head
from ..checkpoint.fingerprint import class_of
from ..checkpoint.messages import clip
from ..checkpoint.source import path_of
from ..checkpoint.writing import write
from ..errors import CheckpointError, listed
from ..sharding import is_first
from .changes import Change, parts_of
from .flat_names import layers_by_key, layout_of, spelling
from .formats import KOHYA
from .lora_file import read, sort
from .matrices import Factors
from .transfer import apply_file, export

# What keys begin with, by which one file holds the models of a pipeline.
_PREFIX = re.compile(r"(lora_unet|lora_te[123]?|lora_prior_(?:unet|te)|lora_transformer|lycoris)_")

_LORA = {"A": "lora_down.weight", "B": "lora_up.weight", "magnitude": "dora_scale"}


def to_kohya(model: nn.Module, path: str | os.PathLike[str], *, prefix: str = "lora_unet") -> None:
    """Write a model adapted by `lora`, `loha` or `lokr` as a file of kohya's scripts, webui or LyCORIS.

    The methods may be joined, each at layers of its own. DoRA, PiSSA and fused projections are written as by
    `to_peft`.

    Args:
        model: A denoiser, text encoder or any other model after `apply(model, "lora", head=None, …)`.
        path: The file, `*.safetensors`.
        prefix: What every key begins with: "lora_unet" for a denoiser, "lora_te" for a text encoder
            ("lora_te1" and "lora_te2" of SDXL), "lycoris" for any model, as LyCORIS' own wrapper writes it.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the format cannot express something. Every reason is given, and nothing is written.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> from medpeft.interchange import to_kohya
        >>> from safetensors.torch import load_file
        >>> unet = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> unet = medpeft.apply(unet, "lora", target="0", head=None, rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     to_kohya(unet, f"{directory}/lora.safetensors")
        ...     print(*sorted(load_file(f"{directory}/lora.safetensors")))
        lora_unet_0.alpha lora_unet_0.lora_down.weight lora_unet_0.lora_up.weight
    """
    path = path_of(model, path)
    changes = export(recovered(model, "to_kohya"), KOHYA)
    layers, tensors = layers_by_key(model), {}
    for name, change in changes.items():
        key = spelling(model, name)
        _require_one(layers[key], key)
        for part, tensor in _tensors_of(change).items():
            tensors[f"{prefix}_{key}.{part}"] = tensor
    if is_first(model.parameters()):
        write(path, tensors, _metadata(changes.values()))


def _tensors_of(change: Change) -> dict[str, Tensor]:
    """Name the tensors of a change as these tools do, with α."""
    parts = parts_of(change)
    rank, factor = change.rank, change.scale
    if change.method == "lokr":
        # Where both factors are whole, readers take α/r for 1. So the factor goes into C.
        first = next(name for name in ("lokr_w1", "lokr_w1_a") if name in parts)
        parts[first] = parts[first] * factor
        rank, factor = rank or 1, 1.0
    tensors = {}
    for part, tensor in parts.items():
        if part == "magnitude":
            tensor = tensor.view(-1, *[1] * (parts["A"].ndim - 1))  # (out,) → (out, 1 …)
        tensors[_LORA.get(part, part)] = tensor
    dtype = torch.promote_types(next(iter(parts.values())).dtype, torch.float32)
    tensors["alpha"] = torch.tensor(factor * rank, dtype=dtype)
    return tensors


def _metadata(changes: Iterable[Change]) -> dict[str, str]:
    """Describe a file as kohya's scripts do; "Dynamic" stands for ranks that differ."""
    changes = list(changes)
    ranks, methods = {change.rank for change in changes}, {change.method for change in changes}
    metadata = {"format": "pt", "ss_network_module": "networks.lora", "ss_network_dim": "Dynamic"}
    if len(ranks) == 1:
        metadata["ss_network_dim"] = str(ranks.pop())
    convolutional = any(isinstance(change, Factors) and change.A.ndim > 2 for change in changes)
    if convolutional or methods != {"lora"}:
        metadata["ss_network_module"] = "lycoris.kohya"
        metadata["ss_network_args"] = json.dumps({"algo": "+".join(sorted(methods))})
    return metadata


def from_kohya(
    model: nn.Module, path: str | os.PathLike[str], *, prefix: str = "lora_unet", head: Head = None
) -> nn.Module:
    """Apply `lora`, `loha` and `lokr` to a base and load a file of kohya's scripts, webui or LyCORIS.

    Names of the UNet may be diffusers' or the original ones (`input_blocks_…`, of SDXL). Factors and ranks
    are treated as by `from_peft`, and Tucker's form of LoRA (`lora_mid`) becomes a LoRA of the same rank.

    Args:
        model: The base, not adapted.
        path: A safetensors file.
        prefix: What the keys of this model begin with, as in `to_kohya`; others are left to their models.
        head: As in `apply`; by default none, since these files have none.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the file is damaged, has nothing with this prefix, or holds what medpeft does not
            compute; each reason is given. The model is untouched.

    Examples:
        >>> import tempfile, medpeft, torch
        >>> from medpeft.interchange import from_kohya, to_kohya
        >>> vit, base = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> vit = medpeft.apply(torch.nn.Sequential(vit), "loha", target="0", head=None, rank=2)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = f"{directory}/loha.safetensors"
        ...     to_kohya(vit, path, prefix="lycoris")
        ...     loaded = from_kohya(torch.nn.Sequential(base), path, prefix="lycoris")
        >>> medpeft.report(loaded).trainable
        32
    """
    path = path_of(model, path)
    named = _by_names_of(model, path, _below(path, prefix, read(path)[0]))
    return apply_file(model, sort(path, named, _scale, KOHYA.methods), KOHYA, head=head)


def _by_names_of(model: nn.Module, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name tensors by the layers of the model.

    Raises:
        CheckpointError: a layer is not in the model, or may be one of several.
    """
    layers = layers_by_key(model)
    unknown = sorted({key.partition(".")[0] for key in tensors} - set(layers))
    if unknown:
        raise CheckpointError(_not_in_the_model(path, model, unknown))
    named = {}
    for key, tensor in tensors.items():
        layer, _, part = key.partition(".")
        _require_one(layers[layer], layer)
        named[f"{layers[layer][0]}.{part}"] = tensor
    return named


def _below(path: str, prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors whose keys begin with a prefix, by their names without it.

    Raises:
        CheckpointError: there are none, or a key begins with no prefix that is known.
    """
    own, others = {}, set()
    for key, tensor in tensors.items():
        match = _PREFIX.match(key)
        if key.startswith(f"{prefix}_"):
            own[key.removeprefix(f"{prefix}_")] = tensor
        elif match is None:
            raise CheckpointError(
                f"{path} holds {clip(repr(key))}, which is no key of kohya's or LyCORIS: they begin with "
                "lora_unet_, lora_te_ or lycoris_. Files of diffusers and peft are read by from_diffusers "
                "and from_peft."
            )
        else:
            others.add(match[1])
    if not own:
        found = listed(sorted(others)) or "nothing"
        raise CheckpointError(f"{path} has nothing for prefix={prefix!r}: its keys begin with {found}.")
    return own


def _not_in_the_model(path: str, model: nn.Module, unknown: list[str]) -> str:
    """Write the message for names in a file that no layer has."""
    message = f"{path} does not fit this {class_of(model).__name__}, which has no {clip(listed(unknown))}."
    layout = layout_of(unknown)
    if layout:
        message += (
            f" These are {layout}: take that model, or convert the file with diffusers (load_lora_weights "
            "and save_lora_weights of the pipeline) and read it by from_diffusers."
        )
    return message


def _require_one(names: list[str], key: str) -> None:
    """Refuse a name in a file that stands for several layers."""
    if len(names) > 1:
        raise CheckpointError(
            f"{clip(repr(key))} may be any of {listed(names)}: their names differ in dots alone."
        )


def _scale(layer: str, rank: int, alpha: float | None) -> float:
    """Compute α/r; 1 without α, where it is 0 (these tools take r then), and where all factors are whole."""
    if not alpha or not rank:
        return 1.0
    return alpha / rank
