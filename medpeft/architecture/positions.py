"""Can a block take extra tokens? Only if its computation does not depend on the tokens' positions.

The reasons against it, each under a name, in the order in which they are looked for:

- inside the block: convolutions, attention without a softmax over tokens, windows, embeddings of positions
  and biases by position
- around it: a bias for each pair of positions, or rotations (RoPE), that the block is given
- in the source of its forward: tokens that come as a grid
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from .attention import is_attention
from .layers import is_conv, parents
from .network import Network
from .weight_reads import source_of, unpacks_input

# Names of modules with a bias for each pair of positions, and of modules that make rotations.
_BIAS = re.compile(
    r"rel_?pos|relative_position|relative_coords|pos_bias|position_bias|attention_bias"
    r"|cpb_mlp|rpb|pos_proj"
)
_ROTARY = re.compile(r"rope|rotary")

# Classes of attentions that compare channels, or tokens without a softmax.
_NO_SOFTMAX = re.compile(r"XCA|Channel|Covariance|Linear(Self)?Att|Lite|Efficient(Attn|Attention)")

# Words of a forward that takes the outputs of several blocks: of timm's `features_only`, or a backbone.
_TAKES_FEATURES = re.compile(
    r"\.forward_intermediates\(|\.get_intermediate_layers\("
    r"|feature_maps|out_indices|output_hidden_states=True"
)

# Arguments of a forward that give the sizes of a grid.
_SIZES = {"size", "feat_size", "hw_shape", "H", "W", "input_dimensions"}


def why_not(network: Network, name: str, *, given_rotations: bool = True) -> str:
    """Reason why extra tokens would change what a block computes for the others; "" if they would not.

    Args:
        network: The model.
        name: Name of a transformer block or of an attention.
        given_rotations: Whether the method makes room for its tokens in rotations that a block is given.
    """
    block = network.modules[name]
    for path, module in block.named_modules(prefix=name):
        reason = _from_inside(path, module, block)
        if reason:
            return reason
    return _from_around(network, name, given_rotations) or _from_source(name, block)


def hands_out_blocks(network: Network, name: str) -> str:
    """Reason why extra tokens would leak into the outputs of intermediate blocks; "" if none is known."""
    row = name.rpartition(".")[0]
    owner = row.rpartition(".")[0]
    by = None
    if ".append(" in source_of(type(network.modules[owner]).forward):
        by = owner
    for around in (*parents(name), ""):
        if by is None and _TAKES_FEATURES.search(source_of(type(network.modules[around]).forward)):
            by = around
    if by is None:
        return ""
    return f"is one of the blocks whose outputs {by or 'the model'} hands out, with the added tokens in them"


def _convolves(module: nn.Module, block: nn.Module) -> bool:
    return is_conv(module)


def _lacks_a_softmax(module: nn.Module, block: nn.Module) -> bool:
    return _NO_SOFTMAX.search(type(module).__name__) is not None


def _shifts_windows(module: nn.Module, block: nn.Module) -> bool:
    # BEiT's attention has a window size without a shift: its window is the whole image.
    return _has_windows(module, block) and (module is block or hasattr(module, "shift_size"))


def _has_windows(module: nn.Module, block: nn.Module) -> bool:
    size = getattr(module, "window_size", None)
    if isinstance(size, (tuple, list)):
        return any(size)
    return isinstance(size, int) and size > 0


def _embeds_positions(module: nn.Module, block: nn.Module) -> bool:
    return "pos_embed" in _holds(module)


def _biases_positions(module: nn.Module, block: nn.Module) -> bool:
    return any(map(_BIAS.search, _holds(module)))


# Contents of a block that rule out extra tokens. The first that holds is the reason.
_REASONS_INSIDE = (
    (_convolves, "convolves the grid of its tokens ({path}), in which added tokens have no place"),
    (_lacks_a_softmax, "does not compare tokens with one another by a softmax ({path}: {cls})"),
    (_shifts_windows, "attends within windows ({path}), of which each would need tokens of its own"),
    (
        _embeds_positions,
        "adds an embedding of their positions to its tokens ({path}), and an added token has no position",
    ),
    (
        _biases_positions,
        "adds a bias for each pair of positions ({path}), and an added token has no position",
    ),
    (_has_windows, "attends within windows ({path}), of which each would need tokens of its own"),
)


def _from_inside(path: str, module: nn.Module, block: nn.Module) -> str:
    for applies, reason in _REASONS_INSIDE:
        if applies(module, block):
            return reason.format(path=path, cls=type(module).__name__)
    return ""


def _from_around(network: Network, name: str, given_rotations: bool) -> str:
    """Reason in the biases and rotations that a block is given or holds itself."""
    can_rotate = _leaves_added_tokens_unrotated(network.modules[name], given_rotations)
    for path in (name, *parents(name), ""):
        by = path or "the model"
        holds = list(_holds(network.modules[path]))
        if any(map(_BIAS.search, holds)):
            return f"is given a bias for each pair of positions (by {by}), and an added token has no position"
        if any(map(_ROTARY.search, holds)) and not can_rotate:
            return f"is rotated by positions (RoPE, by {by}), and an added token has no position"
    return ""


def _leaves_added_tokens_unrotated(module: nn.Module, given_rotations: bool) -> bool:
    """Whether all attentions inside leave tokens before the patches as they are when they rotate."""
    for attention in filter(is_attention, module.modules()):
        rotates = _rotation(type(attention))  # type: ignore[arg-type]  # a class is hashable
        if rotates != "patches" and not (rotates == "given" and given_rotations):
            return False
    return True


@cache
def _rotation(cls: type[nn.Module]) -> str:
    """Way in which an attention keeps the tokens before the patches unrotated; "" if its source shows none.

    "given": it rotates the tokens after `num_prefix_tokens` by rotations that it is given, as in timm.
    "patches": it rotates as many of the last tokens as there are rotations, as Hugging Face's DINOv3.
    """
    source = source_of(cls.forward)
    if "apply_rot_embed_cat" in source and "num_prefix_tokens" in source:
        return "given"
    rotate = getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)
    if "apply_rotary_pos_emb" in source and "num_prefix_tokens" in source_of(rotate):
        return "patches"
    return ""


def _from_source(name: str, block: nn.Module) -> str:
    for path, module in block.named_modules(prefix=name):
        cls: Any = type(module)
        if (module is block or is_attention(module)) and _unpacks_a_grid(cls):
            return f"takes its tokens as a grid ({path}), in which added tokens have no place"
    return ""


@cache
def _unpacks_a_grid(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` asks for a grid's sizes or unpacks its input's shape into four or more."""
    if not source_of(cls.forward):
        return False
    if _SIZES & set(inspect.signature(cls.forward).parameters):
        return True
    # Such as `B, H, W, C = x.shape`, `… = x.size()` or `… = shape` at the start of a line.
    return unpacks_input(cls, r"^\s*(\w+, *){3,}\w+ *= *({x}\.shape|{x}\.size\(\)|shape)(\[|\s*$)")


def _holds(module: nn.Module) -> Iterator[str]:
    """Names of the tensors and modules that a module itself holds."""
    for store in (module._parameters, module._buffers, module._modules):
        for name, value in store.items():
            if value is not None:
                yield name
