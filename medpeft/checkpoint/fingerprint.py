"""Fingerprint of a base: its class, the shapes of its frozen tensors, and a sample of the values of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.record import own_tensors
from ..adapters.samples import has_drifted, sample
from ..architecture.quantised import unpack
from ..errors import CheckpointError
from ..sharding import whole
from .file import digest, short
from .messages import printable


def identify(
    model: nn.Module, frozen: Callable[[str], bool], samples: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Describe a base, as JSON, so that another base has another description.

    A sample of every frozen tensor, spread over all of it, is hashed. This costs far less than
    reading the weights from disk, and finds other pretrained weights, another seed, a fine-tuned copy and
    another dtype, which change almost every element. It can miss a change of a few elements of a large
    tensor.

    Args:
        model: The model, adapted or not; of a sharded one every rank has to take part.
        frozen: Which of the model's own parameters and persistent buffers belong to the base, by name.
        samples: Samples of the base at `apply`, by name. They stand for values that only drifted from them by
            rounding, as those of an averaged model do.

    Returns:
        Class, timm's architecture and tag ("" where not known), digests of all shapes and of all samples, and
        for each tensor "shape dtype digest".
    """
    config = pretrained_config(model)
    tensors = {}
    shapes, values = [], []
    unpack(model)
    for name, tensor in own_tensors(model):
        if frozen(name):
            tensors[name] = f"{_shape(tensor)} {_sample(tensor, (samples or {}).get(name))}"
            shapes.append(f"{name} {_shape(tensor)}")
            values.append(f"{name} {tensors[name]}")
    return {
        "class": class_of(model).__name__,
        "module": class_of(model).__module__,
        "architecture": str(config.get("architecture") or ""),
        "tag": str(config.get("tag") or ""),
        "shapes": digest("\n".join(shapes).encode(), size=8),
        "values": digest("\n".join(values).encode(), size=8),
        "tensors": tensors,
    }


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest of the names, shapes and samples of some tensors."""
    lines = [f"{name} {_shape(tensor)} {_sample(tensor)}" for name, tensor in tensors.items()]
    return digest("\n".join(lines).encode(), size=8)


def label(base: dict[str, Any]) -> str:
    """Name a base by its class, and by timm's architecture and tag where known."""
    architecture = f"{base['architecture']}.{base['tag']}".strip(".")
    if architecture:
        return printable(f"{base['class']} ({architecture})")
    return printable(base["class"])


def class_of(model: nn.Module) -> type[nn.Module]:
    """Return the model's class, without the one that FSDP2's `fully_shard` puts before it."""
    for cls in type(model).__mro__:
        if all(base.__name__ != "FSDPModule" for base in cls.__mro__):
            return cls
    return type(model)


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """Return timm's `pretrained_cfg`, empty for a model without one."""
    config = getattr(model, "pretrained_cfg", None)
    if isinstance(config, dict):
        return config
    return {}


def _shape(tensor: Tensor) -> str:
    """Describe shape and dtype: "4x3 float32"."""
    return f"{'x'.join(map(str, tensor.shape)) or 'scalar'} {short(tensor.dtype)}"


def _sample(tensor: Tensor, before: Tensor | None = None) -> str:
    """Digest of elements from all over the tensor, or of those of `before` that drifted to them.

    Raises:
        CheckpointError: its elements cannot be read.
    """
    full = whole(tensor)
    inner = _inner_tensors(full)
    if inner:
        return digest(" ".join(map(_sample, inner)).encode(), size=8)
    try:
        taken = sample(full).contiguous()
        if before is not None and has_drifted(before, taken):
            taken = before
        return digest(taken.view(torch.uint8).numpy().tobytes(), size=8)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise CheckpointError(
            f"The model holds a {type(full).__name__} of {short(full.dtype)} ({full.layout}) whose values "
            f"cannot be read to tell its base from others: {error}"
        ) from error


def _inner_tensors(tensor: Tensor) -> list[Tensor]:
    """List the plain tensors that a quantised one is made of; none for a plain tensor."""
    flatten: Any = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return []
    names, _ = flatten()
    return [getattr(tensor, name) for name in names]
