"""Bottleneck adapters: two matrices with a nonlinearity between them, after each branch or after the block.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019), arXiv 1902.00751,
Sec. 2.1 and Fig. 2.
Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning" (EACL 2021),
arXiv 2005.00247, App. A.
Steitz & Roth, "Adapters Strike Back" (CVPR 2024), arXiv 2406.06820, Eq. 7 to 9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, along
from ..adapters.options import Count, Probability
from ..adapters.registry import register
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.site import Site
from .two_matrices import TwoMatrices

_HINT = "it adapts transformer blocks with an attention, a norm and an MLP. Try 'lora' or 'conv_adapter'."
_NONLINEARITY = "there is a nonlinearity between the two matrices of its bottleneck"
_UNMERGEABLE = f"{_NONLINEARITY}, which no weight of the layer can replace"
_STD = 0.01
Start = Literal["identity", "official"]


class Bottleneck(nn.Module, TwoMatrices):
    """up(act(down(x))) over the channels of x.

    `down` starts from a normal distribution of deviation 0.01 that is cut off at twice that (Houlsby et al.,
    Sec. 3.6). `up` starts from it too with init="official", else at zero, for the exact identity.
    """

    def __init__(self, site: Site, width: int, act: Callable[[Tensor], Tensor], init: str) -> None:
        super().__init__()
        assert site.layout is not None
        self.axis, self.act = site.layout.axis, act
        self.add_down(site.layout.outputs, width)
        self.add_up(width, site.layout.outputs)
        drawn = [self.down]
        if init == "official":
            drawn.append(self.up)
        for matrix in drawn:
            nn.init.trunc_normal_(matrix, std=_STD, a=-2 * _STD, b=2 * _STD, generator=site.generator)

    def forward(self, x: Tensor) -> Tensor:
        """Compute up(act(down(x))) in the shape of `x`: (B, …, D), or (B, D, …) in a convolutional block."""
        return self.widen(self.act(self.narrow(x, self.axis)), self.axis)


@register("houlsby", hint=_HINT, search={"bottleneck": (4, 8, 16, 32, 64)}, unmergeable=_UNMERGEABLE)
class Houlsby(Adapter):
    """A bottleneck after the attention and another after the MLP of every block: y + up(gelu(down(y))).

    y is the output of the attention or the MLP, (B, …, D), before LayerScale, drop-path and the sum with the
    residual stream.

    Args:
        site: The attention or the MLP of a transformer block.
        bottleneck: Width between `down` and `up`.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(self, site: Site, *, bottleneck: Count = 64, init: Start = "identity") -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, bottleneck, F.gelu, init)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield every attention and every MLP of every transformer block."""
        for block in branches(network):
            for branch in block.branches:
                yield Site(branch.name, branch.module, "", "", layout=branch.layout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + up(gelu(down(y)))."""
        change: Tensor = self.bottleneck(y)
        return y + change.to(y.dtype)


@register("pfeiffer", hint=_HINT, search={"bottleneck": (4, 8, 16, 32, 64)}, unmergeable=_UNMERGEABLE)
class Pfeiffer(Adapter):
    """A bottleneck after every transformer block: y + up(relu(down(y))).

    y is the residual stream after the MLP, (B, …, D). The paper's models normalise there; those that
    normalise before their branches have no norm to apply, so y enters as it is.

    Args:
        site: A transformer block.
        bottleneck: Width between `down` and `up`.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(self, site: Site, *, bottleneck: Count = 64, init: Start = "identity") -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, bottleneck, F.relu, init)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield every transformer block."""
        return _whole_blocks(network)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + up(relu(down(y)))."""
        change: Tensor = self.bottleneck(y)
        return y + change.to(y.dtype)


@register(
    "adapter_plus",
    hint=_HINT,
    search={"bottleneck": (1, 2, 4, 8, 16, 32), "drop_path": (0.0, 0.1)},
    unmergeable=_UNMERGEABLE,
)
class AdapterPlus(Adapter):
    """A bottleneck with a scale per channel after every transformer block: y + s ⊙ up(gelu(down(y))).

    y is the residual stream after the MLP, (B, …, D), the position that the paper calls Post-Adapter.

    Args:
        site: A transformer block.
        bottleneck: Width between `down` and `up`.
        drop_path: Probability with which training leaves a sample's adapter out, as in the authors' settings.
        init: "identity", or "official" for matrices that are both drawn.
    """

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: Count = 8,
        drop_path: Probability = 0.1,
        init: Start = "identity",
    ) -> None:
        super().__init__(site)
        self.bottleneck = Bottleneck(site, bottleneck, F.gelu, init)
        self.scale = nn.Parameter(torch.ones(len(self.bottleneck.up)))
        self.drop_path = drop_path
        assert site.layout is not None
        self.batch_axis = 0
        if site.layout.sequence == 0:
            self.batch_axis = 1

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield every transformer block."""
        return _whole_blocks(network)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s ⊙ up(gelu(down(y))); in training some samples keep y."""
        change: Tensor = self.bottleneck(y)
        change = along(self.scale, change, self.bottleneck.axis) * change
        if self.training and self.drop_path > 0:
            change = change * self._drawn_for_each_sample(change)
        return y + change.to(y.dtype)

    def _drawn_for_each_sample(self, change: Tensor) -> Tensor:
        """Draw 0 or 1 / (1 − drop_path) for every sample, (B, 1, …, 1), so that the mean stays."""
        kept = 1 - self.drop_path
        shape = [1] * change.ndim
        if change.ndim > 2:  # Tokens without a batch, (N, D), are one sample.
            shape[self.batch_axis] = change.shape[self.batch_axis]
        return change.new_empty(shape).bernoulli_(kept).div_(kept)


def _whole_blocks(network: Network) -> Iterator[Site]:
    for block in branches(network):
        yield Site(block.name, block.module, "", "", layout=block.layout)
