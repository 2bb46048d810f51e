"""Weights that a module reads without calling the layer that owns them, found in the source of its `forward`.

timm's BEiT computes `F.linear(x, self.qkv.weight, …)`, and `nn.MultiheadAttention` reads `out_proj.weight`:
an adapter on the output of such a layer never runs. The source tells it for any class, of any library.
"""

from __future__ import annotations

import ast
import dis
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

from .layers import own_tensor

# Asking a tensor for these does not use its values.
_METADATA = {
    *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "layout", "is_meta"),
    *("requires_grad", "data_ptr", "element_size", "is_contiguous", "stride", "is_quantized"),
}
_TENSORS = {
    *("weight", "bias", "in_proj_weight", "in_proj_bias"),
    *("q_proj_weight", "k_proj_weight", "v_proj_weight"),
}
_IN_PLACE_METHOD = re.compile(r"[a-z]\w*[a-z]_")


@cache
def reads(cls: type[nn.Module]) -> frozenset[str]:
    """Find dotted paths below `self`, such as `"self_attn.out_proj.weight"`, that `cls.forward` reads.

    `*` stands for an index that is not a constant. Empty if the source code is not available.
    """
    paths: set[str] = set()
    for function in _reachable(cls):
        if _TENSORS & _names(function.__code__):
            paths.update(_paths_to_tensors(function))
    return frozenset(paths)


@cache
def overwrites(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` changes a tensor in place, by `x += y` or by a method such as `x.add_(y)`.

    In the bytecode, `x += y` of numbers looks the same: True may be too cautious, unless y is a constant.
    """
    return any(_overwrites(function.__code__) for function in _reachable(cls))


@cache
def sets_attributes(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` sets an attribute, such as an attention map for a figure."""
    for function in _reachable(cls):
        if any(step.opname == "STORE_ATTR" for step in dis.get_instructions(function.__code__)):
            return True
        if "setattr" in function.__code__.co_names:
            return True
    return False


def source_of(function: object) -> str:
    """Source code of a function; "" if it is not available."""
    try:
        return inspect.getsource(function)  # type: ignore[arg-type]  # what has no source raises TypeError
    except (OSError, TypeError):
        return ""


def unpacks_input(cls: type[nn.Module], pattern: str) -> bool:
    """Whether a line of `cls.forward` fits a pattern, where `{x}` stands for the name of its input."""
    source = source_of(cls.forward)
    if not source:
        return False
    parameters = list(inspect.signature(cls.forward).parameters)
    if len(parameters) < 2:
        return False
    return re.search(pattern.replace("{x}", parameters[1]), source, flags=re.MULTILINE) is not None


def _overwrites(code: CodeType) -> bool:
    for name in code.co_names:
        if _IN_PLACE_METHOD.fullmatch(name) and name != "requires_grad_":
            return True
    for step, after in pairwise(dis.get_instructions(code)):
        is_augmented = after.opname == "BINARY_OP" and after.argrepr.endswith("=")
        if is_augmented and "CONST" not in step.opname:
            return True
    return False


def _reachable(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """Yield `forward` and the methods of the class that it calls, directly or not."""
    waiting, seen = ["forward"], set()
    while waiting:
        for function in _definitions(cls, waiting.pop()):
            if function not in seen:
                seen.add(function)
                yield function
                waiting.extend(_names(function.__code__))


def _definitions(cls: type[nn.Module], name: str) -> Iterator[FunctionType]:
    """Yield the methods of that name in the class and in its bases, torch's `nn.Module` left out."""
    for base in cls.__mro__:
        if base in (nn.Module, object) or name not in vars(base):
            continue
        function = inspect.unwrap(vars(base)[name])
        if isinstance(function, FunctionType):
            yield function


def _names(code: CodeType) -> set[str]:
    """Names of the attributes and globals in a function, its inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


def _paths_to_tensors(function: FunctionType) -> Iterator[str]:
    """Yield paths such as `fc.weight` whose values a function uses; the module's own tensors are left out."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    # The walk meets `self.fc.weight.shape` before `self.fc.weight`, which is a part of it.
    parts: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node in parts:
            continue
        parts.update(ast.walk(node.value))
        path = _up_to_tensor(_steps(node))
        if len(path) > 1:
            yield ".".join(path)


def _up_to_tensor(steps: list[str]) -> list[str]:
    """Steps up to the first tensor; empty if there is none, or if only its metadata is asked for."""
    for i, step in enumerate(steps):
        if step in _TENSORS:
            asks_metadata = i + 1 < len(steps) and steps[i + 1] in _METADATA
            return [] if asks_metadata else steps[: i + 1]
    return []


def _steps(node: ast.AST) -> list[str]:
    """Split `self.layers[0].fc.weight` into its steps below self; empty for anything else."""
    steps: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            steps.append(node.attr)
        elif isinstance(node.slice, ast.Constant):
            steps.append(str(node.slice.value))
        else:
            steps.append("*")
        node = node.value
    if isinstance(node, ast.Name) and node.id == "self":
        return steps[::-1]
    return []


def has_fused_path(module: nn.Module) -> bool:
    """Whether the module may compute everything inside it by one fused kernel of torch's, in eval mode."""
    return type(module).forward is nn.TransformerEncoderLayer.forward


def resolved(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield each layer that a path below `module` names, with its path and the tensor's name.

    `*` in the path stands for any index.
    """
    *steps, tensor = path.split(".")
    places = [("", module)]
    for step in steps:
        places = list(_children(places, step))
    for layer_path, layer in places:
        if own_tensor(layer, tensor) is not None or tensor in layer._parameters:
            yield layer, layer_path, tensor


def _children(places: list[tuple[str, nn.Module]], step: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the children of that name with their paths, or all children for `*`."""
    for path, module in places:
        for child_name, child in module._modules.items():
            if child is not None and step in ("*", child_name):
                yield f"{path}.{child_name}".lstrip("."), child
