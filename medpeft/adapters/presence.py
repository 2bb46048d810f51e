"""Adapters whose layer was replaced since `apply`: the model's own forward misses them.

A layer that was wired has a `forward` of its own, and a new one in its place has none.

Tools that quantise, fuse or convert make new layers of the old ones' weights and leave the adapters behind
without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..errors import MedpeftError, listed

Path = tuple[str, ...]
"""Names of the modules on the way from the model to one inside it."""

Branch = tuple[str, Path, tuple["Branch", ...]]
"""A child's name; its path if it is wired, else (); and the branches below it."""

# Under these names a wrapper holds what it wraps: torch.compile, checkpointing, FSDP, DataParallel and DDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")


def branches_to(paths: Iterable[Path], above: Path = ()) -> tuple[Branch, ...]:
    """Join the paths of wired modules into a tree: so a forward visits once what is above several of them.

    Args:
        paths: Paths of the modules, from the module where the branches begin.
        above: Path of that module.

    >>> branches_to([("0", "conv"), ("0", "norm")])
    (('0', (), (('conv', ('0', 'conv'), ()), ('norm', ('0', 'norm'), ()))),)
    """
    below: dict[str, list[Path]] = {}
    for first, *rest in paths:
        below.setdefault(first, []).append(tuple(rest))
    branches = []
    for name, rests in below.items():
        path = (*above, name)
        wired_at = path if () in rests else ()  # An empty rest is that of a path which ends here.
        branches.append((name, wired_at, branches_to([rest for rest in rests if rest], path)))
    return tuple(branches)


def require_present(model: nn.Module, branches: tuple[Branch, ...]) -> None:
    """Raise `MedpeftError` if a module that was wired is gone or was replaced.

    Args:
        model: The model.
        branches: Where modules were wired.
    """
    lost = lost_modules(model, branches)
    if lost:
        raise MedpeftError(
            f"{listed(lost, most=1)} has lost its adapters since apply: was the layer replaced, quantised, "
            "fused or converted? Merge first and convert the merged model; or convert first, then apply."
        )


def lost_modules(model: nn.Module, branches: tuple[Branch, ...]) -> list[str]:
    """List the modules that were wired and are no longer there, by the name that they had.

    One that a wrapper has moved counts as there, and one that was taken out of a container does not count as
    lost.
    """
    missing: list[Path] = []
    _add_missing(model, branches, missing)
    if not missing:
        return []
    wired = _wired_names(model)
    lost = []
    for path in missing:
        name = _unwrapped(".".join(path))
        if name not in wired and not _is_cut_off(model, path):
            lost.append(name)
    return lost


def _add_missing(module: nn.Module | None, branches: tuple[Branch, ...], missing: list[Path]) -> None:
    """Add the paths at which there is no module with a forward that was put on it.

    Args:
        module: Where the branches begin; None where there is none any more.
        branches: Those below the module.
        missing: The list to add to.
    """
    for name, wired_at, below in branches:
        child = None
        if module is not None:
            child = module._modules.get(name)
        if wired_at and (child is None or "forward" not in child.__dict__):
            missing.append(wired_at)
        if below:
            _add_missing(child, below, missing)


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
    """Whether a container of modules has nothing any more at this place, as where a list was shortened."""
    module = model
    for name in path:
        child = module._modules.get(name)
        if child is None:
            return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential))
        module = child
    return False
