"""AdaptFormer: a bottleneck beside the MLP of every transformer block.

Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition" (NeurIPS 2022), arXiv 2205.13535, Eq. 2
and 3. The input is the residual stream, as in the authors' code; their figure shows LN(x).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, Handover, cast
from ..adapters.registry import register
from ..architecture.blocks import channels_first, matmuls
from ..architecture.layers import is_conv, own_tensor
from ..architecture.network import Network
from ..architecture.site import Partner, Site
from ..errors import MedpeftError, require_choice, require_positive


@register(
    "adaptformer",
    hint="it adapts transformer blocks with an attention, a norm and an MLP. Try 'lora' or 'ssf'.",
    search={
        "bottleneck": (16, 32, 64, 128),
        "scale": (0.1, 1.0, "learnable"),
        "dropout": (0.0, 0.1),
    },
)
class AdaptFormer(Adapter):
    """A bottleneck parallel to the MLP of every transformer block: y + s·up(drop(relu(down(x)))).

    x is the residual stream after attention, (B, …, D); the sum is outside drop-path and LayerScale.

    Args:
        site: A transformer block, tapped before its MLP.
        bottleneck: Width between `down` and `up`.
        scale: s, or "learnable" (one scalar, initially 1).
        dropout: Probability between `down` and `up`.
    """

    def __init__(self, site: Site, *, bottleneck: int = 64, scale: float | str = 0.1, dropout: float = 0.1) -> None:
        super().__init__(site)
        require_positive("bottleneck", bottleneck)
        if not isinstance(scale, (int, float)):
            require_choice("scale", scale, ("learnable", 0.1))
        width_in, width_out, self.axis = _widths(site)
        self.axis_out = 1 if channels_first(type(site.layer)) else self.axis  # type: ignore[arg-type]  # a class is hashable
        self.down = nn.Parameter(torch.empty(bottleneck, width_in))
        self.down_bias = nn.Parameter(torch.zeros(bottleneck))
        self.up = nn.Parameter(torch.zeros(width_out, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(width_out))
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=site.generator)
        self.scale = nn.Parameter(torch.ones(())) if scale == "learnable" else float(scale)
        self.dropout = nn.Dropout(dropout)
        self.handover = Handover()

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, input: str = "residual") -> Iterator[Site]:
        """Transformer blocks; x is what enters the norm before the MLP, or the MLP itself (input="norm")."""
        require_choice("input", input, ("residual", "norm"))
        for block in network.blocks():
            # In a block that normalises after its MLP, the MLP runs first, and its input is the residual stream.
            entrances = (block.mlp,) if input == "norm" else (block.norm, block.mlp)
            if not matmuls(block.module.get_submodule(block.mlp)):
                continue
            partners = []
            for path in entrances:
                place = Site(f"{block.name}.{path}", block.module.get_submodule(path), "", "")
                partners.append(Partner(place, Entrance))
            yield Site(block.name, block.module, "", "", partners=tuple(partners))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s·up(drop(relu(down(x)))), `x` being the residual stream inside the block, `y` the block's output."""
        x = self.handover.take(x)
        x = cast(x, self.down).movedim(self.axis, -1)
        hidden = self.dropout(F.linear(x, self.down, self.down_bias).relu())
        change = self.scale * F.linear(hidden, self.up, self.up_bias)
        return y + _fitted(change.movedim(-1, self.axis_out), y).to(y.dtype)


def _fitted(change: Tensor, y: Tensor) -> Tensor:
    """`change` in the shape of `y`; zero for the tokens that the MLP does not see."""
    if change.ndim == y.ndim == 3 and change.shape[1] < y.shape[1]:
        # The class blocks of XCiT and VOLO run their MLP on the class token alone, which comes first.
        return F.pad(change, (0, 0, 0, y.shape[1] - change.shape[1]))
    return change.reshape(y.shape)


class Entrance(Adapter):
    """Leaves the input of the norm before the MLP, or of the MLP, for the adapter of the block."""

    def __init__(self, site: Site, first: AdaptFormer) -> None:
        super().__init__(site)
        self.shared["first"] = first

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Return `x`, and leave it."""
        first: Any = self.shared["first"]
        first.handover.leave(x)
        return x


def _widths(site: Site) -> tuple[int, int, int]:
    """Width of what enters the MLP, of what leaves it, and the axis of its channels."""
    layers = matmuls(site.partners[-1].site.layer)
    if not layers:
        raise MedpeftError(f"{site.name} has no MLP whose width is known.")
    first, last = layers[0], layers[-1]
    axis = 1 if is_conv(first) else -1
    width = _weight(first).shape[1]
    # Hugging Face's `intermediate` is the first half of an MLP: what enters the MLP, the residual stream, is what leaves it.
    return width, width if len(layers) == 1 else _weight(last).shape[0], axis


def _weight(layer: nn.Module) -> Tensor:
    weight = own_tensor(layer, "weight")
    if weight is None:
        raise MedpeftError(f"A {type(layer).__name__} of an MLP has no weight to read its width from.")
    return weight
