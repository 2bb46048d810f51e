"""Windows around an attention: where a block's tokens are still a whole image, before and after them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from torch import nn

from .blocks import Branch, Branches
from .layers import child_at, parents
from .weight_reads import source_of

# Calls by which a block cuts its tokens into windows; `grid_partition` of MaxViT cuts them into dilated ones.
_CUTS = re.compile(r"\b(window|grid)_partition\w*\(")

# Calls by which a module around the blocks puts its tokens into the order of windows (NesT, Hiera).
_REORDERS = re.compile(r"\b(blockify|[uU]nroll|undo_windowing)\(")

# Swin V2 normalises what its attention gives; all others normalise what it gets.
_NORMALISES_AFTER = re.compile(r"[vV]2")

_NORMS = ("norm1", "layernorm_before")
_AFTER_ATTENTION = ("ls1", "drop_path1", "drop_path")


class Around(NamedTuple):
    """The places around a windowed attention, as names below the block.

    Attributes:
        before: The norm whose output is what the attention gets; "" where it is the block's own input.
        after: The module whose input is what the attention gives.
    """

    before: str
    after: str


def cuts_windows(block: Branches, branch: Branch) -> bool:
    """Whether the block cuts its tokens into windows before it hands them to this branch.

    Torchvision's Swin does not: there the attention does it itself, and gets the whole image. SAM's put
    their windows together only after LayerScale and drop-path, so no module in them is given the whole.
    """
    return branch.attention and _cuts(type(block.module))  # type: ignore[arg-type]  # a class is hashable


def around_windows(block: Branches) -> Around | None:
    """The places around the attention of a block that cuts windows; None if they are not known."""
    norm = _first_of(_NORMS, block.module)
    if _NORMALISES_AFTER.search(type(block.module).__name__):
        return Around("", norm) if norm else None
    after = _first_of(_AFTER_ATTENTION, block.module)
    if not norm or not after:
        return None
    return Around(norm, after)


def reorders_tokens(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module around the named block hands it tokens in windows, so that it never sees the image."""
    classes = {type(modules[around]) for around in (*parents(name), "")}
    return any(_reorders(cls) for cls in classes)  # type: ignore[arg-type]  # a class is hashable


@cache
def _reorders(cls: type[nn.Module]) -> bool:
    return _REORDERS.search(source_of(cls)) is not None


@cache
def _cuts(cls: type[nn.Module]) -> bool:
    source = source_of(cls)
    return _CUTS.search(source) is not None and "window_unpartition(" not in source


def _first_of(names: tuple[str, ...], block: nn.Module) -> str:
    """The first of the names that is a child of the block, "" if none is."""
    for name in names:
        if child_at(block, name) is not None:
            return name
    return ""
