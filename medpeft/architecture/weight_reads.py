"""Which weights a module reads without calling the layer that owns them, found in the source of its `forward`.

timm's BEiT computes `F.linear(x, self.qkv.weight, …)`, `nn.MultiheadAttention` reads `out_proj.weight`: an adapter on the
output of such a layer never runs. The source says so for any class, third-party ones included.
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

# Asking a tensor for these does not use its values.
_METADATA = {
    *("dtype", "device", "shape", "ndim", "size", "dim", "numel", "is_cuda", "layout", "is_meta"),
    *("requires_grad", "data_ptr", "element_size", "is_contiguous", "stride", "is_quantized"),
}
_TENSORS = {"weight", "bias", "in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"}


@cache
def reads(cls: type[nn.Module]) -> frozenset[str]:
    """Dotted paths below `self`, such as `"self_attn.out_proj.weight"`, that `cls.forward` reads.

    `*` stands for an index that is not a constant. Empty where the source is not at hand.
    """
    found: set[str] = set()
    for function in _reachable(cls):
        if _TENSORS & _names(function.__code__):
            found.update(path for path in _paths(function) if "." in path)
    return frozenset(found)


@cache
def overwrites(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` changes a tensor in place, by `x += y` or by a method such as `x.add_(y)`.

    Read off the bytecode, where `x += y` of numbers looks the same: True may be too cautious, unless y is a constant.
    """
    return any(_overwrites(function.__code__) for function in _reachable(cls))


def _overwrites(code: CodeType) -> bool:
    if any(re.fullmatch(r"[a-z]\w*[a-z]_", name) and name != "requires_grad_" for name in code.co_names):
        return True
    steps = list(dis.get_instructions(code))
    return any(
        after.opname == "BINARY_OP" and after.argrepr.endswith("=") and "CONST" not in step.opname
        for step, after in pairwise(steps)
    )


def _reachable(cls: type[nn.Module]) -> Iterator[FunctionType]:
    """`forward` and the methods of the class that it calls, directly or not."""
    waiting, seen = ["forward"], set()
    while waiting:
        name = waiting.pop()
        for base in cls.__mro__:
            function = inspect.unwrap(vars(base).get(name, None)) if name in vars(base) else None
            if base in (nn.Module, object) or not isinstance(function, FunctionType) or function in seen:
                continue
            seen.add(function)
            yield function
            waiting.extend(_names(function.__code__))


def _names(code: CodeType) -> set[str]:
    """Every attribute and global named in a function, those in its inner functions included."""
    inner = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _paths(function: FunctionType) -> Iterator[str]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    inner: set[ast.AST] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or node in inner:
            continue
        inner.update(n for n in ast.walk(node.value) if isinstance(n, ast.Attribute))
        steps = _steps(node)
        last = next((i for i, step in enumerate(steps) if step in _TENSORS), None)
        if last is not None and not (len(steps) > last + 1 and steps[last + 1] in _METADATA):
            yield ".".join(steps[: last + 1])


def _steps(node: ast.AST) -> list[str]:
    """`self.layers[0].fc.weight` as its steps below self; empty for anything else."""
    steps: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            steps.append(node.attr)
        else:
            steps.append(str(node.slice.value) if isinstance(node.slice, ast.Constant) else "*")
        node = node.value
    return steps[::-1] if isinstance(node, ast.Name) and node.id == "self" else []


def has_fused_path(module: nn.Module) -> bool:
    """Whether the module may compute everything inside it by one fused kernel of torch's, in eval mode."""
    return type(module).forward is nn.TransformerEncoderLayer.forward
