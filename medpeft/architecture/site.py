"""A place in a model where an adapter goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import MedpeftError
from .layers import own_tensor
from .rows import Rows

Shared = TypeVar("Shared", bound=nn.Module)


@dataclass(frozen=True)
class Site:
    """Where an adapter goes.

    Attributes:
        name: Name of the layer in the model, as in `model.named_modules()`.
        layer: The layer.
        kind: What its weight is: "linear", "conv", "transposed", "norm", "embedding", or "block" for a whole block.
        weight: Name of the layer's weight; `in_proj_weight` in `nn.MultiheadAttention`.
        bias: Name of its bias, "" where it can have none.
        rows: Output channels to adapt in a fused projection; empty for all.
        parts: Letters of what the layer computes in an attention (q, k, v, o), "" elsewhere.
        reader: Name of the outermost module that reads the weight without calling the layer, None where there is none.
        overwritten: Whether a module of the model works in place, so that the layer's output may be written over.
        taps: Submodules of the layer; the input of the first of them to run is the adapter's x in place of the layer's own.
        layout: Channels and tokens of a transformer block or of a branch of it, None elsewhere.
        others: Names of other modules of the model on whose outputs the adapter acts too, by `Adapter.elsewhere`.
        unfit: Why the method is not right here, although the layer is of its kind; "" where it is.
        generator: Source of the adapter's initial values.
        dry: Whether only shapes are wanted; `host` is then on the meta device.
        shared: What the method's adapters on one device have in common, by a key of the method's own; see `share`.
    """

    name: str
    layer: nn.Module
    kind: str
    weight: str = "weight"
    bias: str = "bias"
    rows: tuple[Rows, ...] = ()
    parts: str = ""
    reader: str | None = None
    overwritten: bool = False
    taps: tuple[str, ...] = ()
    layout: Layout | None = None
    others: tuple[str, ...] = ()
    unfit: str = ""
    generator: torch.Generator | None = field(default=None, compare=False)
    dry: bool = False
    shared: dict[Any, nn.Module] = field(default_factory=dict, compare=False)

    def tensor(self, name: str) -> Tensor | None:
        """The layer's own weight or bias, whatever covers it; None where it has none."""
        return own_tensor(self.layer, name)

    @property
    def host(self) -> Tensor:
        """The layer's weight, detached; a `MedpeftError` where it has none."""
        weight = self.tensor(self.weight)
        if weight is None:
            raise MedpeftError(f"{self.name} ({type(self.layer).__name__}) has no {self.weight} to adapt.")
        return weight.detach().to("meta") if self.dry else weight.detach()

    def share(self, key: Any, make: Callable[[], Shared]) -> Shared:
        """The module that the method's adapters share by this key, made where it is first asked for.

        Each of them registers it as a child: it then moves, is copied, counted and saved once, under the first one's name.
        """
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]  # type: ignore[return-value]  # a key names modules of one type

    @property
    def key(self) -> str:
        """What follows the method's name in the adapter's own name, so that two weights of one layer keep apart."""
        return "" if self.weight in ("weight", "") else f"_{self.weight}"


@dataclass(frozen=True)
class Layout:
    """Channels and tokens of a block or branch.

    Attributes:
        inputs: Channels that enter.
        outputs: Channels that leave.
        axis: Of the channels: -1, or 1 in a convolutional block.
        sequence: Axis of the tokens: 1, or 0 where the batch comes second.
        prefix: Tokens before those of the patches: class, distillation and register tokens.
        grid: Patches along each axis of the image, where the model says so; else empty.
        dims: Axes of the image: 2, or 3 for volumes.
        patch: Values in a patch, the fan-in of the patch embedding; `inputs` where that is not known.
    """

    inputs: int
    outputs: int
    axis: int = -1
    sequence: int = 1
    prefix: int = 0
    grid: tuple[int, ...] = ()
    dims: int = 2
    patch: int = 0
