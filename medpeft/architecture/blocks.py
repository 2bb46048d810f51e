"""Transformer blocks and their branches: channels, and how the tokens are laid out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor, nn

from ..errors import MedpeftError
from .attention import is_attention, projections
from .layers import any_tensor, is_conv, parents
from .network import Network, TransformerBlock
from .site import Layout
from .weight_reads import unpacks_input

# Parameters that hold a token before the patches; CrossViT has one for each of its two rows of blocks.
_PREFIX_TOKEN = re.compile(
    r"(cls_token|class_token|class_embedding|dist_token|distillation_token|reg_token|register_tokens)(_\d+)?"
)


@dataclass(frozen=True)
class Branch:
    """A module whose output a block adds to its residual stream.

    Attributes:
        name: Name of the module in the model.
        module: The module.
        layout: Channels and tokens that enter and leave.
        attention: Whether it is an attention; else it is an MLP.
        half: Whether the module is only the second half of the branch, so that its input is not the branch's.
    """

    name: str
    module: nn.Module
    layout: Layout
    attention: bool
    half: bool = False


@dataclass(frozen=True)
class Branches:
    """A transformer block and its branches: the attentions, then the MLP.

    `mlp` and `norm` are as in `TransformerBlock`.
    """

    name: str
    module: nn.Module
    mlp: str
    norm: str
    branches: tuple[Branch, ...]

    @property
    def stream(self) -> Layout:
        """Layout of the residual stream, as the branches see it."""
        return self.branches[-1].layout

    @property
    def layout(self) -> Layout:
        """Layout of the block's input and output."""
        if channels_first(type(self.module)):  # type: ignore[arg-type]  # a class is hashable
            return replace(self.stream, axis=1)
        return self.stream


@dataclass(frozen=True)
class FeedForward:
    """The matrix layers of an MLP: names of the first (two, if one of them is a gate) and of the last."""

    first: tuple[str, ...]
    last: str


def branches(network: Network) -> Iterator[Branches]:
    """Yield every transformer block with its branches; blocks of unknown widths are left out."""
    for block in network.blocks():
        sequence = 1 if _batch_comes_first(block.module) else 0
        members = [
            _attention_branch(network, f"{block.name}.{child}", sequence) for child in block.attentions
        ]
        members.append(_mlp_branch(network, f"{block.name}.{block.mlp}", sequence))
        of_known_width = [branch for branch in members if branch is not None]
        if len(of_known_width) == len(members):
            yield Branches(block.name, block.module, block.mlp, block.norm, tuple(of_known_width))


def _batch_comes_first(block: nn.Module) -> bool:
    for module in block.modules():
        if hasattr(module, "batch_first"):
            return bool(module.batch_first)
    return True


def _attention_branch(network: Network, name: str, sequence: int) -> Branch | None:
    module = network.modules[name]
    ends = _attention_ends(module)
    if ends is None:
        return None
    return Branch(name, module, _layout(network, name, sequence, *ends), attention=True)


def _mlp_branch(network: Network, name: str, sequence: int) -> Branch | None:
    module = network.modules[name]
    layers = matmuls(module)
    if len(layers) == 1:
        return _second_half(network, name, sequence, layers[0])
    if not layers:
        return None
    return Branch(name, module, _layout(network, name, sequence, layers[0], layers[-1]), attention=False)


def _second_half(network: Network, name: str, sequence: int, first: nn.Module) -> Branch | None:
    """The second of two modules that make up an MLP, as in older Hugging Face models."""
    second = _second_half_name(name.rpartition(".")[0])
    if second not in network.modules:
        return None
    module = network.modules[second]
    last = [first, *matmuls(module)][-1]
    return Branch(second, module, _layout(network, second, sequence, first, last), attention=False, half=True)


def _second_half_name(block: str) -> str:
    return f"{block}.output.dense"


@cache
def channels_first(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` unpacks its input as (B, C, H, W), by its source, as DaViT's blocks do."""
    # Such as `B, C, H, W = x.shape` at the start of a line.
    return unpacks_input(cls, r"^\s*\w+, *[Cc]\w*, *\w+, *\w+ *= *{x}\.(shape|size\(\))")


def attention_layout(network: Network, name: str) -> Layout | None:
    """Layout of an attention, in a block or not; None if its widths are not known."""
    module = network.modules[name]
    ends = _attention_ends(module)
    if ends is None:
        return None
    sequence = 1 if getattr(module, "batch_first", True) else 0
    return _layout(network, name, sequence, *ends)


def matmuls(module: nn.Module) -> list[nn.Module]:
    """Linear layers and convolutions of a module, in order."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear) or is_conv(layer)]


def _attention_ends(attention: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The layer that makes an attention's queries or values, and the one that makes its output."""
    core = next((module for module in attention.modules() if is_attention(module)), attention)
    first: list[nn.Module] = []
    last: list[nn.Module] = []
    for projection in projections(core):
        layer = core.get_submodule(projection.path)
        if projection.parts == "o":
            last.append(layer)
        elif set(projection.parts) & {"q", "v"}:
            first.append(layer)
    if not first:
        return None
    # In older Hugging Face attentions, the output projection lies in the module around them.
    return first[0], (last or matmuls(attention))[-1]


def _layout(network: Network, name: str, sequence: int, first: nn.Module, last: nn.Module) -> Layout:
    """Layout of the input of `first` and the output of `last`, two layers of the named module."""
    inputs = _weight(first).shape[1]
    # The first convolution of the model cuts the image into patches, so it shows the image's axes.
    embedding = next((module for module in network.modules.values() if is_conv(module)), None)
    dims, patch = 2, inputs
    if embedding is not None:
        kernel = _weight(embedding)
        dims, patch = max(kernel.ndim - 2, 1), kernel[0].numel()
    return Layout(
        inputs=inputs,
        outputs=_weight(last).shape[0],
        axis=1 if is_conv(first) else -1,
        sequence=sequence,
        prefix=_prefix_tokens(network, name),
        grid=_grid(network, name),
        dims=dims,
        patch=patch,
    )


def _weight(layer: nn.Module) -> Tensor:
    for name in ("weight", "in_proj_weight", "q_proj_weight"):
        tensor = any_tensor(layer, name)
        if tensor is not None:
            return tensor
    raise MedpeftError(f"{type(layer).__name__} has no weight.")


def _around(network: Network, name: str) -> dict[str, nn.Module]:
    """The modules around one by name, the nearest first and the model last."""
    if not name:
        return {}
    return {parent: network.modules[parent] for parent in (*parents(name), "")}


def _prefix_tokens(network: Network, name: str) -> int:
    """Tokens before those of the patches: as timm's models say, else by the parameters that hold them."""
    around = _around(network, name)
    for module in around.values():
        tokens = getattr(module, "num_prefix_tokens", None)
        if isinstance(tokens, int):
            return tokens
    counts = {}
    for parameter, tensor in network.model.named_parameters():
        owner, _, last = parameter.rpartition(".")
        token = _PREFIX_TOKEN.fullmatch(last)
        if token and (owner in around or owner.rpartition(".")[0] in around):
            counts[token[1]] = tensor.shape[-2] if tensor.ndim == 3 else 1
    return sum(counts.values())


def _grid(network: Network, name: str) -> tuple[int, ...]:
    """Patches along each axis, as the patch embedding of timm's models says; empty if none does."""
    for module in _around(network, name).values():
        embedding = module._modules.get("patch_embed")
        grid = getattr(embedding, "grid_size", None)
        if isinstance(grid, tuple) and all(isinstance(size, int) for size in grid):
            return grid
        # XCiT's patch embedding has only the number of patches.
        patches = getattr(embedding, "num_patches", 0)
        if isinstance(patches, int) and patches > 0:
            side = math.isqrt(patches)
            if side**2 == patches:
                return (side, side)
    return ()


def feed_forwards(network: Network) -> Iterator[FeedForward]:
    """Yield the matrix layers of every MLP outside the head."""
    for name, module in network.modules.items():
        is_torchs = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if is_torchs and not network.in_head(name):
            yield FeedForward((f"{name}.linear1".lstrip("."),), f"{name}.linear2".lstrip("."))
    names = {module: name for name, module in network.modules.items()}
    for block in network.blocks():
        layers = _mlp_layers(network, block, names)
        if len(layers) > 1:
            # A gate takes the same input as the first layer.
            width = _inputs(network, layers[0])
            first = tuple(layer for layer in layers[:-1] if _inputs(network, layer) == width)
            yield FeedForward(first, layers[-1])


def _mlp_layers(network: Network, block: TransformerBlock, names: dict[nn.Module, str]) -> list[str]:
    """Names of the matrix layers of a block's MLP, in order."""
    layers = [names[layer] for layer in matmuls(network.modules[f"{block.name}.{block.mlp}"])]
    second = _second_half_name(block.name)
    if len(layers) == 1 and second in network.modules:
        layers.append(second)
    return layers


def _inputs(network: Network, name: str) -> int:
    layer = network.modules[name]
    weight = any_tensor(layer, "weight")
    return 0 if weight is None else weight.shape[1] * getattr(layer, "groups", 1)
