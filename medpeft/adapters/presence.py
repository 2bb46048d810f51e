"""Adapters whose layer was replaced since `apply`: the model's own forward misses them.

A layer that was wired has a `forward` of its own, and a new one in its place has none.

Tools that quantise, fuse or convert make new layers of the old ones' weights and leave the adapters behind
without a word.
"""

from __future__ import annotations

from torch import nn

from ..errors import MedpeftError, listed

Path = tuple[str, ...]
"""Names of the modules on the way from the model to one inside it; split, as every forward follows them."""

Branch = tuple[str, bool, tuple["Branch", ...]]
"""A child by its name, whether it is wired, and the branches below it."""

# Under these names a wrapper holds what it wraps: torch.compile, checkpointing, FSDP, DataParallel and DDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def tree_of(paths: tuple[Path, ...]) -> tuple[Branch, ...]:
    """Join paths into a tree, in which every module stands once: a forward walks it in half of the time.

    >>> tree_of((("0", "conv"), ("0", "norm")))
    (('0', False, (('conv', True, ()), ('norm', True, ()))),)
    """
    below: dict[str, list[Path]] = {}
    for first, *rest in paths:
        below.setdefault(first, []).append(tuple(rest))
    branches = []
    for name, rests in below.items():
        is_wired = () in rests  # A path that ends here.
        branches.append((name, is_wired, tree_of(tuple(rest for rest in rests if rest))))
    return tuple(branches)


def require_present(model: nn.Module, paths: tuple[Path, ...], branches: tuple[Branch, ...] = ()) -> None:
    """Raise `MedpeftError` if a module that was wired is no longer there, and another has taken its place.

    Args:
        model: The model.
        paths: Where modules were wired.
        branches: The same as a tree, which is quicker to walk; empty where it is not at hand.
    """
    if branches and _are_wired(model, branches):
        return
    lost = lost_modules(model, paths)
    if lost:
        raise MedpeftError(
            f"{listed(lost, most=1)} has lost its adapters since apply: was the layer replaced, quantised, "
            "fused or converted? Merge first and convert the merged model; or convert first, then apply."
        )


def lost_modules(model: nn.Module, paths: tuple[Path, ...]) -> list[str]:
    """List the modules that were wired and are no longer there, by the name that they had.

    One that a wrapper has moved counts as there, and one of a list that was shortened is not missed.
    """
    missing = [path for path in paths if not _is_wired_at(model, path)]
    if not missing:
        return []
    wired = _wired_names(model)
    lost = []
    for path in missing:
        name = _unwrapped(".".join(path))
        if name not in wired and not _is_cut_off(model, path):
            lost.append(name)
    return lost


def _are_wired(module: nn.Module, branches: tuple[Branch, ...]) -> bool:
    """Whether every wired module below one is there, with a forward that was put on it."""
    children = module._modules
    for name, is_wired, below in branches:
        child = children.get(name)
        if child is None or (is_wired and "forward" not in child.__dict__):
            return False
        if below and not _are_wired(child, below):
            return False
    return True


def _is_wired_at(model: nn.Module, path: Path) -> bool:
    """Whether there is a module at this path with a forward that was put on it."""
    module = model
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return False
        module = child
    return "forward" in module.__dict__


def _wired_names(model: nn.Module) -> set[str]:
    """Names, without those of wrappers, of all modules with a forward that was put on them."""
    names = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if "forward" in module.__dict__:
            names.add(_unwrapped(name))
    return names


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _is_cut_off(model: nn.Module, path: Path) -> bool:
    """Whether a list of modules has nothing any more at this place, as where it was shortened."""
    module = model
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        module = child
    return False
