"""Which base a checkpoint belongs to: its class, the shapes of its frozen tensors, and a sample of the values of each."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapters
from ..sharding import whole
from .file import printable, short

SAMPLES = 256
"""Elements of each tensor that enter its digest."""


def identify(model: nn.Module, frozen: Callable[[str], bool]) -> dict[str, Any]:
    """What tells a base from others, as JSON.

    Of every frozen tensor `SAMPLES` elements, spread over all of it, are hashed, which costs far less than reading the weights
    from disk. Other pretrained weights, another seed, a fine-tuned copy or another dtype change almost every element and are
    found. A change of a few elements of a large tensor is not; tensors of up to `SAMPLES` elements are hashed whole.

    Args:
        model: The model, adapted or not; of a sharded one every rank has to take part.
        frozen: Which of the model's own parameters and persistent buffers belong to the base, by name.

    Returns:
        Class, timm's architecture and tag ("" where not known), digests of all shapes and of all samples, and for each tensor
        "shape dtype digest".
    """
    config = pretrained_config(model)
    tensors = {name: _described(tensor) for name, tensor in own_tensors(model) if frozen(name)}
    shapes = [f"{name} {text.rpartition(' ')[0]}" for name, text in tensors.items()]
    return {
        "class": class_of(model).__name__,
        "module": class_of(model).__module__,
        "architecture": str(config.get("architecture") or ""),
        "tag": str(config.get("tag") or ""),
        "shapes": _digest("\n".join(shapes).encode()),
        "values": _digest("\n".join(f"{name} {text}" for name, text in tensors.items()).encode()),
        "tensors": tensors,
    }


def differences(saved: dict[str, Any], here: dict[str, Any], *, shown: int = 3) -> list[str]:
    """What differs between the base of a file and the one at hand: architecture, shapes, values; empty if nothing."""
    if saved["class"] != here["class"]:
        return [f"architecture: {label(saved)} in the file, {label(here)} here"]
    old, new = saved["tensors"], here["tensors"]
    apart = [f"{n!r} is not in this model" for n in old if n not in new]
    apart += [f"{n!r} is not in the file's base" for n in new if n not in old]
    both = [n for n in old if n in new]
    shapes = {n: (old[n].rpartition(" ")[0], new[n].rpartition(" ")[0]) for n in both}
    apart += [f"{n!r} is {a} in the file's base, {b} here" for n, (a, b) in shapes.items() if a != b]
    if apart:
        return [f"shapes: {_some(apart, shown)}"]
    values = [n for n in both if old[n] != new[n]]
    if not values:
        return []
    of = "" if label(saved) == label(here) else f" ({label(saved)} in the file, {label(here)} here)"
    names = _some([repr(name) for name in values], shown)
    return [f"values: {len(values)} of {len(both)} frozen tensors are not those of its base{of}: {names}"]


def label(base: dict[str, Any]) -> str:
    """A base in words: its class, and timm's architecture and tag where known."""
    name = ".".join(part for part in (base["architecture"], base["tag"]) if part)
    return printable(f"{base['class']} ({name})" if name else base["class"])


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's own parameters and persistent buffers, each once under its first name; no adapter's."""
    seen: set[int] = set()
    for prefix, module in _own_modules(model, ""):
        buffers = ((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)
        for name, tensor in (*module._parameters.items(), *buffers):
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield prefix + name, tensor


def _own_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Adapters):
            yield from _own_modules(child, f"{prefix}{name}.")


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's class; FSDP2's `fully_shard` puts one of its own before it."""
    classes = [cls for cls in type(model).__mro__ if all(base.__name__ != "FSDPModule" for base in cls.__mro__)]
    return classes[0]


def pretrained_config(model: nn.Module) -> dict[str, Any]:
    """timm's `pretrained_cfg`, empty for a model without one."""
    config = getattr(model, "pretrained_cfg", None)
    return config if isinstance(config, dict) else {}


def _described(tensor: Tensor) -> str:
    size = "x".join(map(str, tensor.shape)) or "scalar"
    return f"{size} {short(tensor.dtype)} {_sample(tensor)}"


def _sample(tensor: Tensor) -> str:
    full = whole(tensor)
    # Types of one byte, float8 among them, as bytes: torch can take elements of few types of that size.
    full = full.view(torch.uint8) if full.element_size() == 1 else full
    taken = torch.take(full, _positions(full.numel()).to(full.device)).cpu()
    return _digest(taken.view(torch.uint8).numpy().tobytes())


@lru_cache(maxsize=256)
def _positions(numel: int) -> Tensor:
    """Indices spread evenly, by multiples of the golden ratio: a constant step could stay within one column."""
    if numel <= SAMPLES:
        return torch.arange(numel)
    golden = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio
    return torch.tensor([(i * golden % 2**64) * numel >> 64 for i in range(SAMPLES)])


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _some(items: Iterable[str], shown: int) -> str:
    listed = list(items)
    more = f", and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more
