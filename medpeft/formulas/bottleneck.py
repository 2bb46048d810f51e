"""Bottleneck adapters: two matrices with a nonlinearity between them, after the branches of a block or after the block.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019), arXiv 1902.00751, Sec. 2.1 and Fig. 2.
Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (EACL 2021), arXiv 2005.00247, App. A.
Steitz & Roth, "Adapters Strike Back" (CVPR 2024), arXiv 2406.06820, Eq. 7 to 9.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, cast
from ..adapters.registry import register
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require, require_choice, require_positive

_HINT = "it adapts transformer blocks with an attention, a norm and an MLP. Try 'lora' or 'conv_adapter'."
_STD = 0.01
_INITS = ("identity", "official")
_WHY = "there is a nonlinearity between the two matrices of its bottleneck, which no weight of the layer can replace"


class Bottleneck(nn.Module):
    """up(act(down(x))) over the channels of x.

    `down` starts as a normal distribution of deviation 0.01 cut off at twice that (Houlsby et al., Sec. 3.6), and so does `up`
    if init="official"; else `up` starts at zero, for the exact identity.
    """

    def __init__(self, site: Site, width: int, act: Any, init: str) -> None:
        super().__init__()
        require_positive("bottleneck", width)
        require_choice("init", init, _INITS)
        assert site.layout is not None
        channels, self.axis, self.act = site.layout.outputs, site.layout.axis, act
        self.down = nn.Parameter(torch.empty(width, channels))
        self.down_bias = nn.Parameter(torch.zeros(width))
        self.up = nn.Parameter(torch.zeros(channels, width))
        self.up_bias = nn.Parameter(torch.zeros(channels))
        for matrix in (self.down, self.up) if init == "official" else (self.down,):
            nn.init.trunc_normal_(matrix, std=_STD, a=-2 * _STD, b=2 * _STD, generator=site.generator)

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D), or (B, D, …) → (B, D, …) in a convolutional block."""
        hidden = self.act(F.linear(cast(x, self.down).movedim(self.axis, -1), self.down, self.down_bias))
        return F.linear(hidden, self.up, self.up_bias).movedim(-1, self.axis)


@register("houlsby", hint=_HINT, search={"bottleneck": (4, 8, 16, 32, 64)}, unmergeable=_WHY)
class Houlsby(Adapter):
    """A bottleneck after the attention and another after the MLP of every block: y + up(gelu(down(y))).

    y is what the attention or the MLP gives, (B, …, D), before LayerScale, drop-path and the sum with the residual stream.

    Args:
        site: The attention or the MLP of a transformer block.
        bottleneck: Width between `down` and `up`.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(self, site: Site, *, bottleneck: int = 64, init: str = "identity") -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, bottleneck, F.gelu, init)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Every attention and every MLP of every transformer block."""
        for block in branches(network):
            for branch in block.branches:
                yield Site(branch.name, branch.module, "", "", layout=branch.layout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + up(gelu(down(y)))."""
        change: Tensor = self.bottleneck(y)
        return y + change.to(y.dtype)


@register("pfeiffer", hint=_HINT, search={"bottleneck": (4, 8, 16, 32, 64)}, unmergeable=_WHY)
class Pfeiffer(Adapter):
    """A bottleneck after every transformer block: y + up(relu(down(y))).

    y is the residual stream after the MLP, (B, …, D). The paper's models normalise there; those that normalise before their
    branches have no norm to apply, so y enters as it is.

    Args:
        site: A transformer block.
        bottleneck: Width between `down` and `up`.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(self, site: Site, *, bottleneck: int = 64, init: str = "identity") -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, bottleneck, F.relu, init)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Every transformer block."""
        return _whole_blocks(network)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + up(relu(down(y)))."""
        change: Tensor = self.bottleneck(y)
        return y + change.to(y.dtype)


@register("adapter_plus", hint=_HINT, search={"bottleneck": (1, 2, 4, 8, 16, 32), "drop_path": (0.0, 0.1)}, unmergeable=_WHY)
class AdapterPlus(Adapter):
    """A bottleneck with a scale per channel after every transformer block: y + s ⊙ up(gelu(down(y))).

    y is the residual stream after the MLP, (B, …, D), the position that the paper calls Post-Adapter.

    Args:
        site: A transformer block.
        bottleneck: Width between `down` and `up`.
        drop_path: Probability with which training leaves a sample's adapter out, as in the authors' settings.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(self, site: Site, *, bottleneck: int = 8, drop_path: float = 0.1, init: str = "identity") -> None:
        super().__init__(site)
        require(0 <= drop_path < 1, f"drop_path={drop_path!r} is no probability below 1.")
        self.bottleneck = Bottleneck(site, bottleneck, F.gelu, init)
        self.scale = nn.Parameter(torch.ones(len(self.bottleneck.up)))
        self.drop_path = drop_path

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Every transformer block."""
        return _whole_blocks(network)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s ⊙ up(gelu(down(y))), of a whole sample or of none of it."""
        axis = self.bottleneck.axis
        change: Tensor = (self.scale * self.bottleneck(y).movedim(axis, -1)).movedim(-1, axis)
        if self.training and self.drop_path > 0:
            kept = 1 - self.drop_path
            change = change * change.new_empty(len(y), *[1] * (y.ndim - 1)).bernoulli_(kept).div_(kept)
        return y + change.to(y.dtype)


def _whole_blocks(network: Network) -> Iterator[Site]:
    for block in branches(network):
        yield Site(block.name, block.module, "", "", layout=block.layout)
