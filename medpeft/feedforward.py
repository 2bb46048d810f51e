"""Where the MLP of a transformer block begins and ends: the layers that read its input, and the one that writes its output."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .adapter import own_tensor
from .blocks import matmuls
from .targets import Network


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
