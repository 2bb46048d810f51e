"""What a transformer block, or a branch of it, takes and gives: channels, and how its tokens are laid out."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from torch import Tensor, nn

from .attention import is_attention, projections
from .layers import is_conv, own_tensor
from .network import Network
from .site import Layout

_PREFIX = re.compile(r"(cls_token|class_token|class_embedding|dist_token|distillation_token|reg_token|register_tokens)(_\d+)?")


@dataclass(frozen=True)
class Branch:
    """A module whose output a block adds to its residual stream; `half` if what enters the branch is not its own input."""

    name: str
    module: nn.Module
    layout: Layout
    attention: bool
    half: bool = False


def branches(network: Network) -> Iterator[tuple[str, nn.Module, list[Branch]]]:
    """Every transformer block with its attentions and its MLP, in that order; blocks of unknown widths are left out."""
    layers = set(network.attention_layers.values())
    for name, block, mlp, _ in network.blocks():
        attends = [child for child in block._modules if f"{name}.{child}" in layers]
        sequence = 1 if next((m.batch_first for m in block.modules() if hasattr(m, "batch_first")), True) else 0
        found = [_branch(network, f"{name}.{child}", child != mlp, sequence) for child in (*attends, mlp)]
        known = [branch for branch in found if branch is not None]
        if len(known) == len(found):
            yield name, block, known


def _branch(network: Network, name: str, attention: bool, sequence: int) -> Branch | None:
    module = network.modules[name]
    ends = _attention_ends(module) if attention else matmuls(module)
    if not ends:
        return None
    half = not attention and len(ends) == 1
    if half:
        # Hugging Face's older MLPs are two modules, of which the second adds the residual stream by itself.
        sibling = f"{name.rpartition('.')[0]}.output.dense"
        if sibling not in network.modules:
            return None
        inside = matmuls(network.modules[sibling])
        name, module, ends = sibling, network.modules[sibling], [*ends, *inside]
    return Branch(name, module, _layout(network, name, sequence, ends[0], ends[-1]), attention, half)


@cache
def channels_first(cls: type[nn.Module]) -> bool:
    """Whether `cls.forward` unpacks its input as (B, C, H, W), by its source: DaViT's blocks, whose MLPs have channels last."""
    try:
        source, names = inspect.getsource(cls.forward), list(inspect.signature(cls.forward).parameters)
    except (OSError, TypeError, ValueError):
        return False
    given = names[1] if len(names) > 1 else "x"
    return re.search(rf"^\s*\w+, *[Cc]\w*, *\w+, *\w+ *= *{given}\.(shape|size\(\))", source, flags=re.MULTILINE) is not None


def whole_layout(block: nn.Module, found: list[Branch]) -> Layout:
    """The layout of a whole block, whose branches are known."""
    layout = found[-1].layout
    return replace(layout, axis=1) if channels_first(type(block)) else layout  # type: ignore[arg-type]  # a class is hashable


def attention_layout(network: Network, name: str) -> Layout | None:
    """The layout of an attention, in a block or not; None where its widths are not known."""
    module = network.modules[name]
    ends = _attention_ends(module)
    sequence = 1 if getattr(module, "batch_first", True) else 0
    return _layout(network, name, sequence, ends[0], ends[-1]) if ends else None


def matmuls(module: nn.Module) -> list[nn.Module]:
    """The Linear layers and convolutions of a module, in order."""
    return [m for m in module.modules() if isinstance(m, nn.Linear) or is_conv(m)]


def _attention_ends(attention: nn.Module) -> list[nn.Module]:
    """The layer that computes an attention's queries or values and the one that computes its output."""
    core = next((m for m in attention.modules() if is_attention(m)), attention)
    found = projections(core)
    first = [core.get_submodule(p.path) for p in found if set(p.parts) & {"q", "v"}]
    last = [core.get_submodule(p.path) for p in found if p.parts == "o"]
    # In Hugging Face's older attentions, the output projection lies in the module around them.
    return [first[0], last[0] if last else matmuls(attention)[-1]] if first else []


def _layout(network: Network, name: str, sequence: int, first: nn.Module, last: nn.Module) -> Layout:
    embedding = next((m for m in network.modules.values() if is_conv(m)), None)
    weight = _weight(embedding) if embedding is not None else None
    return Layout(
        inputs=_weight(first).shape[1],
        outputs=_weight(last).shape[0],
        axis=1 if is_conv(first) else -1,
        sequence=sequence,
        prefix=_prefix_tokens(network, name),
        grid=_grid(network, name),
        dims=2 if weight is None else max(weight.ndim - 2, 1),
        patch=_weight(first).shape[1] if weight is None else weight[0].numel(),
    )


def _weight(layer: nn.Module) -> Tensor:
    own = {**layer._buffers, **layer._parameters}
    found = next((own[n] for n in ("weight", "in_proj_weight", "q_proj_weight") if own.get(n) is not None), None)
    return getattr(layer, "weight") if found is None else found  # noqa: B009 - typed as Any


def _around(network: Network, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules around one of that name, the nearest first, the model last."""
    while name:
        name = name.rpartition(".")[0]
        yield name, network.modules[name]


def _prefix_tokens(network: Network, name: str) -> int:
    """Tokens before those of the patches: as timm's models say, or by the parameters that hold them elsewhere."""
    around = dict(_around(network, name))
    for module in around.values():
        said = getattr(module, "num_prefix_tokens", None)
        if isinstance(said, int):
            return said
    counts = {}
    for parameter, tensor in network.model.named_parameters():
        owner, _, last = parameter.rpartition(".")
        held = _PREFIX.fullmatch(last)
        if held and (owner in around or owner.rpartition(".")[0] in around):
            # CrossViT has one for each of its two rows of blocks.
            counts[held[1]] = tensor.shape[-2] if tensor.ndim == 3 else 1
    return sum(counts.values())


def _grid(network: Network, name: str) -> tuple[int, ...]:
    """Patches along each axis, as the patch embedding of timm's models says."""
    for _, module in _around(network, name):
        embedding = module._modules.get("patch_embed")
        said, number = getattr(embedding, "grid_size", None), getattr(embedding, "num_patches", 0)
        if isinstance(said, tuple) and all(isinstance(size, int) for size in said):
            return said
        if isinstance(number, int) and number > 0 and math.isqrt(number) ** 2 == number:
            return (math.isqrt(number),) * 2  # XCiT
    return ()


def feed_forwards(network: Network) -> Iterator[tuple[tuple[str, ...], str]]:
    """Names of the first layers (two where one of them is a gate) and of the last, for every MLP outside the head."""
    names = {id(module): name for name, module in network.modules.items()}
    for name, module in network.modules.items():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) and not network.inside(
            name, network.head
        ):
            yield (f"{name}.linear1".lstrip("."),), f"{name}.linear2".lstrip(".")
    for block, _, mlp, _ in network.blocks():
        layers = [names[id(layer)] for layer in matmuls(network.modules[f"{block}.{mlp}"])]
        # In Hugging Face's older models the second half of an MLP is a module of its own.
        layers += [f"{block}.output.dense"] if len(layers) == 1 and f"{block}.output.dense" in network.modules else []
        if len(layers) > 1:
            yield tuple(name for name in layers[:-1] if _inputs(network, name) == _inputs(network, layers[0])), layers[-1]


def _inputs(network: Network, name: str) -> int:
    weight = own_tensor(network.modules[name], "weight")
    return 0 if weight is None else weight.shape[1] * getattr(network.modules[name], "groups", 1)
