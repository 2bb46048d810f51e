"""Weights from a file: what of a model they fill, and which are refused, every tensor by its name."""

import argparse
import hashlib
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medpeft.architecture.head import find_head
from medpeft.errors import listed

from ..errors import TrainerError
from .matching import Match, State, best_match, fitted

# Buffers that follow from the architecture, or count; files lack them or have them in excess.
COMPUTED = ("num_batches_tracked", "relative_position_index", "relative_coords_table", "attn_mask")


@dataclass(frozen=True)
class Filled:
    """What a file gave a model.

    Attributes:
        tensors: that it gives, by the model's names.
        trunk: number of the model's tensors outside the head; `COMPUTED` ones are not counted.
        resampled: those of another size, such as position embeddings.
        fresh: parts of the model that it does not have; they train with the head.
        unused: tensors of the file that the model does not have.
        head_fits: the head came from the file too.
    """

    tensors: State
    trunk: int
    resampled: list[str]
    fresh: list[str]
    unused: list[str]
    head_fits: bool

    def lines(self, source: str) -> list[str]:
        """Say in words what was found in a file."""
        fresh = [*self.fresh]
        if not self.head_fits:
            fresh.append("the head")
        lines = [f"{source}: {self.trunk} tensors before the head, all found"]
        if self.fresh:
            lines = [f"{source}: {len(self.tensors)} of {self.trunk} tensors before the head found"]
        if fresh:
            lines.append(f"  begin at random, and train with the head: {', '.join(fresh)}")
        if self.resampled:
            lines.append(f"  brought to the model's size: {', '.join(self.resampled)}")
        if self.unused:
            lines.append(f"  in the file and not in the model: {', '.join(_grouped(self.unused))}")
        return lines


def load_weights(model: nn.Module, file: Path, head: str | None = None) -> Filled:
    """Fill a model from a file, and say what was found; on the meta device, only say so.

    Args:
        model: with a fresh head.
        file: a state dict: .safetensors, or what torch.save wrote.
        head: the name of the model's head (default: found).

    Raises:
        TrainerError: the file cannot be read, or belongs to another model; the model is as before.
    """
    return fill(model, read(file), f"--weights {file}", head)


def digest(file: Path) -> str:
    """Name the content of a file by its SHA-256."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read(file: Path) -> Any:
    """Read what a file holds, without running any code that it may bring.

    Raises:
        TrainerError: it holds other things than tensors and plain values, or is damaged.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # RETFound and other files of MAE's code keep their command line, which is a plain Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (OSError, RuntimeError, EOFError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise TrainerError(
                f"--weights {file} holds {named[1]} beside tensors, and reading that could run code. If you "
                "trust the file, keep its tensors alone: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], 'w.pth')"
            ) from error
        problem = [*str(error).splitlines(), type(error).__name__][0]
        raise TrainerError(
            f"--weights {file} cannot be read: {problem} Give a state dict, as .safetensors, .pth or .pt."
        ) from error


def fill(model: nn.Module, content: Any, source: str, head: str | None = None) -> Filled:
    """Put into a model what a file's content has for it.

    Args:
        model: with a fresh head.
        content: what was read: tensors by name, in dictionaries.
        source: what to call it in messages.
        head: the name of the model's head (default: found).

    Raises:
        TrainerError: it is of another model; the model is as before.
    """
    heads = find_head(model, head or "auto")
    match = best_match(model, content)
    found = match.tensors
    if not found:
        raise TrainerError(f"{source} has no tensors by name. Give a file that holds a state dict.")
    wanted = {name: value for name, value in model.state_dict().items() if not name.endswith(COMPUTED)}
    trunk = [name for name in wanted if not _within(name, heads)]
    tensors: State = {}
    resampled: list[str] = []
    misshapen: list[str] = []
    for name, target in wanted.items():
        if name not in found:
            continue
        value = fitted(found[name], target)
        if value is not None:
            tensors[name] = value
            if match.shape_in_file(name) != target.shape:
                resampled.append(name)
        elif name in trunk:
            misshapen.append(f"{name} {tuple(found[name].shape)} for {tuple(target.shape)}")
    _require_same_model(source, model, match, misshapen, tensors, trunk)
    unused = [name for name in found if name not in wanted and not name.endswith(COMPUTED)]
    fresh = _fresh_parts(source, model, trunk, tensors)
    _require_no_more(source, unused, match.depth, tensors, heads)
    if all(not value.is_meta for value in wanted.values()):
        model.load_state_dict(tensors, strict=False)
    head_fits = all(name in tensors for name in wanted if _within(name, heads))
    given = {name: tensors[name] for name in tensors if name in trunk}
    return Filled(given, len(trunk), resampled, fresh, unused, head_fits)


def _require_same_model(
    source: str, model: nn.Module, match: Match, misshapen: list[str], tensors: State, trunk: list[str]
) -> None:
    """Refuse weights of another architecture, and of another size of this one."""
    matching = sum(name in tensors for name in trunk)
    if misshapen and 2 * (matching + len(misshapen)) >= len(trunk):
        raise TrainerError(
            f"{source} is of another size than this {type(model).__name__}: {listed(misshapen)}. "
            "Choose the --model, its --model-option and --image-size that the weights were trained with."
        )
    if 2 * matching < len(trunk):
        lacking = [name for name in trunk if name not in tensors]
        raise TrainerError(
            f"{source} has {matching} of the {len(trunk)} tensors of this {type(model).__name__} before its "
            f"head. It lacks {listed(lacking[:3])}; it has {listed(list(match.file)[:3])}. "
            "Choose the --model that the weights belong to, or a file in the form of its library."
        )


def _fresh_parts(source: str, model: nn.Module, trunk: list[str], tensors: State) -> list[str]:
    """Name the children of the model of which the file has nothing.

    Raises:
        TrainerError: it has a part of a child, or lacks a parameter that lies in none.
    """
    names: dict[str, list[str]] = {}
    for name in trunk:
        names.setdefault(name.partition(".")[0], []).append(name)
    fresh: list[str] = []
    partial: list[str] = []
    for child, own in names.items():
        lacking = [name for name in own if name not in tensors]
        if lacking == own and child in model._modules:
            fresh.append(child)
        else:
            partial += lacking
    if partial:
        raise TrainerError(
            f"{source} lacks {listed(partial)}, which this {type(model).__name__} would keep at random "
            "values. Choose the variant of --model that the weights belong to, or switch the layers off with "
            "--model-option."
        )
    return fresh


def _require_no_more(
    source: str, unused: list[str], depth: int, tensors: State, heads: tuple[str, ...]
) -> None:
    """Refuse layers that the model lacks amid those that it has: it would compute another thing."""
    filled = {".".join(name.split(".")[:depth]) for name in tensors if not _within(name, heads)}
    outside = [name for name in unused if not _within(name, heads)]
    excess = [name for name in outside if ".".join(name.split(".")[:depth]) in filled]
    if excess:
        raise TrainerError(
            f"{source} has {listed(excess)}, and the model computes without. Choose the variant of "
            "--model that the weights belong to, or switch the layers on: --model-option init_values=1e-5 "
            "makes timm's ls1.gamma, qkv_bias=True its biases."
        )


def _within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _grouped(names: list[str]) -> list[str]:
    """Name single tensors, and the beginning of several with their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    words: list[str] = []
    for beginning, own in groups.items():
        words.append(own[0] if len(own) == 1 else f"{beginning}.* ({len(own)})")
    return words
