"""The trunk of a model: its blocks in the order of a forward, each with its widths and what it is made of.

These are its transformer blocks, or, where it has none, its residual blocks of convolutions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.conv import _ConvNd

from .attention import is_attention
from .blocks import branches, matmuls
from .depth import in_forward_order, outermost_blocks
from .layers import NOT_BODY, parents
from .network import Network
from .site import Layout, Site, Unfit

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

# Gates of channels or pixels inside a block.
_GATE = re.compile(r"(^|\.)(se\w*|attn\w*|attention|ca|sa|gate\w*)(\.|$)")

_NO_CHAIN = "is neither a known transformer block nor a chain of convolutions, as a dense block is none"

_HEADS = ("num_heads", "num_attention_heads", "heads", "n_head")


@dataclass(frozen=True)
class TransformerBody:
    """What a transformer block is made of: heads, width inside the MLP, and side of its windows (0: none)."""

    heads: int
    hidden: int
    window: int


@dataclass(frozen=True)
class Convolution:
    """One convolution of a residual block's body; a linear layer counts as one of 1×1."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    groups: int


def trunk(network: Network) -> list[Site | Unfit]:
    """List a site for every block of the trunk in depth; the module around all of them is `Draft.around`."""
    blocks = _transformer_blocks(network) or _residual_blocks(network)
    order = in_forward_order(network.modules)
    blocks.sort(key=lambda block: order.index(block.name))
    around = _around_all(network, [block.name for block in blocks])
    sites: list[Site | Unfit] = []
    for block in blocks:
        if isinstance(block, Site):
            block = replace(block, draft=replace(block.draft, around=around))
        sites.append(block)
    return sites


def _transformer_blocks(network: Network) -> list[Site | Unfit]:
    sites: list[Site | Unfit] = []
    sites += [Site(block.name, block.module, "", "", layout=block.layout) for block in branches(network)]
    return sites


def _residual_blocks(network: Network) -> list[Site | Unfit]:
    sites: list[Site | Unfit] = []
    for name in outermost_blocks(network.modules, (), network.head):
        module = network.modules[name]
        if not network.in_depth(name):
            continue
        body = convolution_body(module)
        if not body:
            sites.append(Unfit(name, _NO_CHAIN))
            continue
        dims = len(body[0].kernel)
        layout = Layout(body[0].inputs, body[-1].outputs, axis=1, dims=dims)
        sites.append(Site(name, module, "", "", layout=layout))
    return sites


def _around_all(network: Network, names: list[str]) -> str:
    """Name of the nearest module around all blocks that runs as a whole, and not as a container of layers."""
    common: list[str] = []
    for name in names:
        around = [*parents(name), ""]
        common = [place for place in (common or around) if place in around]
    for place in common:
        if not isinstance(network.modules[place], _CONTAINERS):
            return place
    return ""


def has_attention(block: nn.Module) -> bool:
    """Whether a block is one of a transformer, and not of convolutions alone."""
    return any(map(is_attention, block.modules()))


def transformer_body(block: nn.Module, layout: Layout) -> TransformerBody:
    """Read off a transformer block its heads, the width inside its MLP and its windows."""
    heads, window, hidden = 0, 0, 0
    for module in block.modules():
        for attribute in _HEADS:
            count = getattr(module, attribute, 0)
            if isinstance(count, int) and count > 0 and not heads:
                heads = count
        window = window or _side(getattr(module, "window_size", 0))
    for layer in matmuls(block):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.shape[0] == layout.outputs:
            hidden = weight.shape[1]  # That of the last layer, of the MLP.
    return TransformerBody(heads or max(1, layout.inputs // 64), hidden or 4 * layout.inputs, window)


def _side(window: object) -> int:
    if isinstance(window, (tuple, list)):
        window = max((size for size in window if isinstance(size, int)), default=0)
    if isinstance(window, int):
        return window
    return 0


def convolution_body(block: nn.Module) -> list[Convolution]:
    """List the convolutions of a residual block, beside its shortcut.

    There are none if they are no chain, or the block gives more than the last of them, as a dense one.
    """
    chain: list[Convolution] = []
    if "Dense" in type(block).__name__:
        return []
    sizes = [layer.kernel_size for layer in block.modules() if isinstance(layer, _ConvNd)]
    if not sizes:
        return []
    for name, layer in block.named_modules():
        if NOT_BODY.search(name) or _GATE.search(name):
            continue
        if isinstance(layer, nn.Linear):
            chain.append(Convolution(layer.in_features, layer.out_features, (1,) * len(sizes[0]), 1))
        elif isinstance(layer, _ConvNd):
            kernel = tuple(layer.kernel_size)
            chain.append(Convolution(layer.in_channels, layer.out_channels, kernel, layer.groups))
    for i in range(1, len(chain)):
        if chain[i].inputs != chain[i - 1].outputs:
            return []
    return chain
