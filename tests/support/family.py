"""What a family of models is: how to build a tiny one, and what the methods find in it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

CLASSES = 3


@dataclass(frozen=True)
class Family:
    """How to build a tiny model, the shape of its input, and what it is made of.

    Attributes:
        build: Builds the model, with whatever initial weights its library gives.
        shape: Shape of the input, batch of two first.
        has: What the methods need: some of "norm", "batchnorm", "layernorm", "attention", "attention blocks",
            "conv blocks", "transformer blocks", "head".
        head: What to pass to `apply`.
        dead: Globs of parameters that cannot change the output, adapted or not.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    has: frozenset[str]
    head: str | None
    dead: tuple[str, ...]


FAMILIES: dict[str, Family] = {}

CNN = frozenset({"norm", "batchnorm", "conv blocks", "head"})
CONVNEXT = frozenset({"norm", "layernorm", "conv blocks", "head"})
TRANSFORMER = frozenset({"norm", "layernorm", "attention", "attention blocks", "transformer blocks", "head"})

# The softmax over the keys does not see what is added to all of them.
KEYS = ("*.k_proj.bias", "*.k_proj.adapters.ssf.shift")
POSITIONS = ("*.rel_pos.mlp.fc2.bias", "*.rel_pos.mlp.fc2.adapters.ssf.shift")


def family(has, shape, head="auto", dead=()):
    """Decorator that lists a builder under its own name."""

    def add(build):
        FAMILIES[build.__name__] = Family(build, shape, frozenset(has), head, dead)
        return build

    return add


IMAGE = (2, 3, 32, 32)
