"""Depth: the last blocks of a model, and all that runs after the first of them.

Blocks are the outermost transformer blocks, residual blocks and stages, in the order in which a forward
meets them. Libraries register modules in that order, with these exceptions:

- `_RUNS_AFTER`: a child that is registered before one that it needs
- a `ModuleList` beside the blocks has one element for each stage, as the norms of EfficientViM
- an embedding comes before all blocks, wherever it is registered
- parameters of a module that holds blocks (tokens, positions) come before all blocks too, and stand before
  the first block in the list
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping

from torch import nn

from ..errors import MedpeftError
from .layers import NOT_BODY, is_norm, is_residual_block, kind_of, parents, within

# diffusers' UNets register `mid_block` last, and in it attentions before the first ResNet. MONAI's
# AttentionUnet gates what comes up from its submodule.
# A child, and the one that must run before it.
_RUNS_AFTER = {"up_blocks": "mid_block", "attentions": "resnets", "attention": "submodule"}

# Blocks that are residual and not called so.
_BLOCKS = re.compile(r"PreActBasic|SelectiveKernelBasic|XceptionModule")


def last_modules(
    modules: Mapping[str, nn.Module], transformers: Collection[str], head: Collection[str], depth: float
) -> frozenset[str]:
    """Name the modules of the last share of a model's blocks, and those that run after its first block.

    Args:
        modules: All modules of the model by name.
        transformers: Names of the blocks around an attention.
        head: Names of the modules of the head.
        depth: The share, of which as many blocks are taken as come nearest to it, at least one.

    Raises:
        MedpeftError: no block is known.
    """
    blocks = outermost_blocks(modules, transformers, head)
    if not blocks:
        raise MedpeftError(
            f"depth={depth} takes a share of the blocks of a model, and in {type(modules['']).__name__} none "
            "is known (transformer blocks, residual blocks, stages): pass target with the names of its last "
            "layers."
        )
    kept = blocks[-max(1, round(depth * len(blocks))) :]
    last = set()
    names = in_forward_order(modules)
    for name in names[names.index(kept[0]) :]:
        if within(name, kept) or not _runs_earlier(name, modules, blocks):
            last.add(name)
    return frozenset(last)


def in_forward_order(modules: Mapping[str, nn.Module]) -> list[str]:
    """List the names of all modules of a model in the order of a forward."""
    # A module that is shared has a further name, by which `named_modules` does not know it.
    return [name for name in _inside(modules[""], "") if name in modules]


def _inside(module: nn.Module, name: str) -> Iterator[str]:
    yield name
    for child_name in _children_in_order(module):
        child = module._modules[child_name]
        if child is not None:
            yield from _inside(child, f"{name}.{child_name}".lstrip("."))


def _children_in_order(module: nn.Module) -> list[str]:
    names = list(module._modules)
    for late, early in _RUNS_AFTER.items():
        if late in names and early in names:
            names.remove(early)
            names.insert(names.index(late), early)
    return names


def outermost_blocks(
    modules: Mapping[str, nn.Module], transformers: Collection[str], head: Collection[str]
) -> list[str]:
    """List the blocks outside the head that lie in no other block, in the order of a forward.

    The arguments are those of `last_modules`.
    """
    candidates = []
    for name in in_forward_order(modules):
        is_block = name in transformers or _is_block_by_class(name, modules[name])
        if name and is_block and not isinstance(modules[name], nn.ModuleList) and not within(name, head):
            candidates.append(name)
    blocks: list[str] = []
    for name in candidates:
        # A tower that pools by an attention is the parent of one, and no block.
        is_tower = not is_residual_block(modules[name]) and any(
            name in parents(other) for other in candidates
        )
        if not is_tower and not within(name, blocks[-1:]):
            blocks.append(name)
    return blocks


def _is_block_by_class(name: str, module: nn.Module) -> bool:
    if is_norm(module) or NOT_BODY.search(name):
        return False
    return is_residual_block(module) or _BLOCKS.search(type(module).__name__) is not None


def _runs_earlier(name: str, modules: Mapping[str, nn.Module], blocks: list[str]) -> bool:
    """Whether a module outside the kept blocks may run before them, although it is registered after."""
    if kind_of(modules[name]) == "embedding":
        return True
    for parent in (name, *parents(name)):
        is_list = isinstance(modules[parent], nn.ModuleList)
        if is_list and not any(within(block, [parent]) for block in blocks):
            return True
    return False
