"""Tensors of a file under the names that a model has for them.

What differs from file to file is found by trying what matches most:

- the dictionary that holds the tensors ({"model": …}, {"state_dict": …}, {"teacher": …}, or none),
- what their names begin with ("module.", "backbone.", "encoder."),
- what the model's names begin with, where the file is of a part of it ("swinViT."),
- names that the model's library renames when it loads files of its own.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from monai.networks.nets.swin_unetr import SwinUNETR, filter_swinunetr
from torch import Size, Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

State = dict[str, Tensor]


@dataclass(frozen=True)
class Match:
    """One reading of a file.

    Attributes:
        tensors: by the model's names, and by their own where the model has none.
        inside: the child of the model that they belong to, as "swinViT."; "" for the model itself.
        before: the tensors before a library changed them.
        file: the tensors as the file names them.
    """

    tensors: State
    inside: str
    before: State
    file: State

    @property
    def depth(self) -> int:
        """Number of parts of a name that tell one part of what was filled from another."""
        return self.inside.count(".") + 1

    def shape_in_file(self, name: str) -> Size:
        """Give the shape that a tensor has in the file."""
        return self.before.get(name, self.tensors[name]).shape


def best_match(model: nn.Module, content: Any) -> Match:
    """Give the reading of a file's content that has most of the model's names, and then of its shapes."""
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    best = Match({}, "", {}, {})
    most = (-1, -1)
    for match in _readings(model, content):
        names = [name for name in match.tensors if name in shapes]
        fitting = sum(match.tensors[name].shape == shapes[name] for name in names)
        if (len(names), fitting) > most:
            most, best = (len(names), fitting), match
    return best


def _readings(model: nn.Module, content: Any) -> Iterator[Match]:
    for state in _states(content):
        for renamed in _renamed(model, state):
            stripped, inside = _stripped(model, renamed)
            yield Match(stripped, inside, stripped, state)
            yield Match(_by_library(model, stripped), inside, stripped, state)
            yield Match(_by_library(model, renamed), "", renamed, state)


def fitted(value: Tensor, target: Tensor) -> Tensor | None:
    """Give a tensor in the shape that the model has, None if it cannot be had."""
    if value.shape == target.shape:
        return value
    grey = value.ndim == target.ndim > 2 and value.shape[1] == 1 and target.shape[1] == 3
    if grey and value.shape[0] == target.shape[0] and value.shape[2:] == target.shape[2:]:
        # A grey image comes in three equal channels: a third of the weight on each computes the same.
        return (value / 3).expand(target.shape)
    return None


def _states(content: Any, depth: int = 0) -> Iterator[State]:
    """Yield every dictionary of tensors in a file; a teacher or an average before what it was made of."""
    if not isinstance(content, dict) or depth > 3:
        return
    tensors: State = {}
    for name, value in content.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            tensors[name] = value
    if tensors:
        yield tensors
    for name in sorted(content, key=lambda name: not re.search("teacher|ema", str(name))):
        yield from _states(content[name], depth + 1)


def _renamed(model: nn.Module, state: State) -> Iterator[State]:
    """Yield a state dict as it is, and with names that published files are known to have otherwise."""
    yield state
    # DINOv2 trains its blocks in chunks: blocks.1.7.attn is block 7.
    chunks = {re.sub(r"(^|\.)blocks\.\d+\.(\d+\.)", r"\1blocks.\2", name): name for name in state}
    if len(chunks) == len(state):
        yield {new: state[name] for new, name in chunks.items()}
    yield _of_children(model, state)
    if isinstance(model, SwinUNETR):
        plain = {re.sub(r"\.fc([12])\.", r".linear\1.", name): value for name, value in state.items()}
        yield plain
        yield _of_swin_unetr(plain)


def _of_children(model: nn.Module, state: State) -> State:
    """Name children that are numbered, as RadImageNet's are: a Sequential of the model's children."""
    children = [name for name, _ in model.named_children()]
    result: State = {}
    for name, value in state.items():
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if numbers and int(parts[numbers[0]]) < len(children):
            parts[numbers[0]] = children[int(parts[numbers[0]])]
        result[".".join(parts)] = value
    return result


def _of_swin_unetr(state: State) -> State:
    """Rename the encoder, as MONAI does, and keep what has the model's names already."""
    result: State = {}
    for name, value in state.items():
        renamed = filter_swinunetr(name, value)  # type: ignore[no-untyped-call]
        new = name
        if renamed is not None:
            new = renamed[0]
        result[new] = value
    return result


def _stripped(model: nn.Module, state: State) -> tuple[State, str]:
    """Take off what the names begin with, and put on the child whose names they then are."""
    names = set(model.state_dict())
    beginnings = {"": len(state)}
    for name in state:
        parts = name.split(".")
        for depth in (1, 2, 3):
            beginning = ".".join(parts[:depth]) + "."
            beginnings[beginning] = beginnings.get(beginning, 0) + 1
    insides = ["", *(f"{name}." for name, _ in model.named_children())]
    best, most = ("", ""), 0
    for beginning, count in beginnings.items():
        if count <= most:
            continue
        rest = [name.removeprefix(beginning) for name in state if name.startswith(beginning)]
        for inside in insides:
            matching = sum(inside + name in names for name in rest)
            if matching > most:
                best, most = (beginning, inside), matching
    beginning, inside = best
    # What does not begin so is of something else: it keeps its whole name, and is reported by it.
    result: State = {}
    for name, value in state.items():
        new = name
        if name.startswith(beginning):
            new = inside + name.removeprefix(beginning)
        result[new] = value
    return result, inside


def _by_library(model: nn.Module, state: State) -> State:
    """Let timm or torchvision rename and resample what it knows of a model, as with its own files."""
    module = sys.modules[type(model).__module__]
    convert = getattr(module, "checkpoint_filter_fn", None)
    try:
        if isinstance(model, VisionTransformer):
            # Its copy of the state dict is changed in place.
            resampled: State = interpolate_embeddings(model.image_size, model.patch_size, dict(state))
            return resampled
        if convert is None:
            return state
        converted = convert(dict(state), model)
    # Such functions expect files of their own model, and stumble over others in any way.
    except Exception:
        return state
    return {name: value for name, value in converted.items() if isinstance(value, Tensor)}
