"""Which blocks and attentions may be given more tokens: those that tokens pass without regard to their positions."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache

from torch import nn

from .attention import is_attention
from .layers import is_conv
from .network import Network

_BIAS = re.compile(r"rel_?pos|relative_position|relative_coords|attention_bias|pos_bias|position_bias|cpb_mlp|rpb|pos_proj")

_ROTARY = re.compile(r"rope|rotary")

_SIZES = {"size", "feat_size", "hw_shape", "H", "W", "input_dimensions"}

_CHANNELS = re.compile(r"XCA|Channel|Covariance|Linear(Self)?Att|Lite|Efficient(Attn|Attention)")


def hands_out_blocks(network: Network, name: str) -> str:
    """Why others would see tokens that stay in from the block of that name to a later one; "" where none are known to."""
    row = name.rpartition(".")[0]
    owner = row.rpartition(".")[0]
    try:
        source = inspect.getsource(type(network.modules[owner]).forward)
    except (OSError, TypeError):
        return ""
    if ".append(" not in source:
        return ""
    return f"is one of the blocks whose outputs {owner or 'the model'} hands out, with the added tokens in them"


def why_not(network: Network, name: str, *, given_rotations: bool = True) -> str:
    """Why the block or attention of that name computes something else once tokens are added; "" where it does not.

    Between tokens there may be nothing but attention: no convolution, no window, no bias by their positions. A rotation (RoPE)
    may leave the tokens before the patches as they are; where it is given to every block, `given_rotations` says whether the
    method makes room in it.
    """
    module = network.modules[name]
    for path, inside in module.named_modules(prefix=name):
        if is_conv(inside):
            return f"convolves the grid of its tokens ({path}), in which added tokens have no place"
        if _CHANNELS.search(type(inside).__name__):
            return f"does not compare tokens with one another by a softmax ({path}: {type(inside).__name__})"
        # BEiT's attention has a window too, its whole image.
        shifts = hasattr(inside, "shift_size") or inside is module
        if _is_set(inside, "window_size") and shifts:
            return f"attends within windows ({path}), of which each would need tokens of its own"
        if "pos_embed" in _held(inside):
            return f"adds an embedding of their positions to its tokens ({path}), and an added token has no position"
        if any(_BIAS.search(held) for held in _held(inside)):
            return f"adds a bias for each pair of positions ({path}), and an added token has no position"
        if _is_set(inside, "window_size"):
            return f"attends within windows ({path}), of which each would need tokens of its own"
    for path, outside in _around(network, name):
        if any(_BIAS.search(held) for held in _held(outside)):
            return f"is given a bias for each pair of positions (by {path or 'the model'}), and an added token has no position"
        kinds = {_rotation(type(m)) for m in module.modules() if is_attention(m)}  # type: ignore[arg-type]  # as below
        still = kinds <= ({"patches", "given"} if given_rotations else {"patches"})
        if any(_ROTARY.search(held) for held in _held(outside)) and not still:
            return f"is rotated by positions (RoPE, by {path or 'the model'}), and an added token has no position"
    for path, inside in module.named_modules(prefix=name):
        if (inside is module or is_attention(inside)) and _takes_a_grid(type(inside)):  # type: ignore[arg-type]  # hashable
            return f"takes its tokens as a grid ({path}), in which added tokens have no place"
    return ""


@cache
def _rotation(cls: type[nn.Module]) -> str:
    """How an attention rotates the patches alone: by rotations "given" to it (timm), or the last tokens, "patches" (DINOv3).

    Empty where its source does not say so.
    """
    turn = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
    try:
        source, turning = inspect.getsource(cls.forward), inspect.getsource(turn) if turn is not None else ""
    except (OSError, TypeError):
        return ""
    if "apply_rot_embed_cat" in source and "num_prefix_tokens" in source:
        return "given"
    return "patches" if "apply_rotary_pos_emb" in source and "num_prefix_tokens" in turning else ""


@cache
def _takes_a_grid(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward`, by its source, asks for a grid's sizes or unpacks its input's shape into four or more."""
    try:
        source, names = inspect.getsource(cls.forward), list(inspect.signature(cls.forward).parameters)
    except (OSError, TypeError, ValueError):
        return False
    if _SIZES & set(names):
        return True
    given = names[1] if len(names) > 1 else ""
    said = rf"^\s*(\w+, *){{3,}}\w+ *= *({given}\.shape|{given}\.size\(\)|shape)(\[|\s*$)"
    return bool(given) and re.search(said, source, flags=re.MULTILINE) is not None


def _around(network: Network, name: str) -> Iterator[tuple[str, nn.Module]]:
    while name:
        yield name, network.modules[name]
        name = name.rpartition(".")[0]
    yield "", network.model


def _held(module: nn.Module) -> Iterator[str]:
    """Names of the tensors and modules that a module itself holds."""
    for store in (module._parameters, module._buffers, module._modules):
        yield from (name for name, value in store.items() if value is not None)


def _is_set(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is a size other than zero, or several."""
    value = getattr(module, name, None)
    return any(value) if isinstance(value, (tuple, list)) else isinstance(value, int) and value > 0
