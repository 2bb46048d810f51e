"""FacT: the changes of all weights as one tensor, held in factors that the layers share.

Jie & Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer" (AAAI 2023),
arXiv 2212.03145, there FacT-TT (tensor train) and FacT-TK (Tucker).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.options import Count, Factor, Probability
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require


class Factors(nn.Module):
    """U and V, (d, r) each, and for Tucker the core C, (r, r, r), which all blocks of width d share.

    Attributes:
        blocks: Number of those blocks in the model.
    """

    def __init__(
        self, width: int, rank: int, form: str, blocks: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.blocks = blocks
        self.u = nn.Parameter(torch.empty(width, rank))
        self.v = nn.Parameter(torch.zeros(width, rank))
        self.core: nn.Parameter | None = None
        nn.init.uniform_(self.u, -(width**-0.5), width**-0.5, generator=generator)
        if form == "tucker":
            self.core = nn.Parameter(torch.empty(rank, rank, rank))
            nn.init.xavier_uniform_(self.core, generator=generator)


@register(
    "fact",
    hint="it adapts the attentions and MLPs of transformers. Try 'lora' or 'ssf'.",
    search={"scale": (0.01, 0.1, 1.0, 10.0, 100.0), "rank": (4, 8, 16, 32)},
)
class FacT(Adapter):
    """A change of every weight by d×d blocks whose factors U and V all layers share: W + s·[V·Σᵢ·Uᵀ].

    d is the smaller side of the weight. A query, key or value is one block; an MLP's layer of 4d is four,
    one above the other or side by side. Blocks that jut out are cut off. V starts at zero.

    Args:
        site: A linear layer or 1×1 convolution of an attention or MLP, or the `in_proj_weight` of an
            attention.
        rank: r.
        scale: s.
        form: "tt", a tensor train, where every block has its own Σᵢ, (r, r); or "tucker", where it is a
            combination of r matrices common to all blocks: Σᵢ = Σⱼ Pᵢⱼ·Cⱼ.
        dropout: Probability between Σᵢ and V; 0 where FacT changes the weight itself.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 16,
        scale: Factor = 1.0,
        form: Literal["tt", "tucker"] = "tt",
        dropout: Probability = 0.0,
    ) -> None:
        super().__init__(site)
        self.outputs, self.inputs = site.host.flatten(1).shape  # (out, in, 1, …) → (out, in)
        self.tall = self.outputs >= self.inputs
        self.scale, self.dropout = float(scale), nn.Dropout(dropout)
        self.width, self.blocks = _width_and_blocks(site)
        # The shared factors first: their initial values must not depend on the layer's own.
        self.shared["factors"] = site.share(self.width, lambda: self._make_factors(site, rank, form))
        shape = (self.blocks, rank, rank) if form == "tt" else (self.blocks, rank)
        self.sigma = nn.Parameter(torch.empty(shape))
        bound = self._bound(rank, form)
        nn.init.uniform_(self.sigma, -bound, bound, generator=site.generator)
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT
        require(
            self.acts_on != ON_WEIGHT or dropout == 0.0,
            f"dropout={dropout!r} cannot act at {site.name}, where FacT changes the weight itself (a "
            "convolution, or a weight that its parent reads): use dropout=0.",
        )

    def _make_factors(self, site: Site, rank: int, form: str) -> Factors:
        """Make U, V and the core for all blocks of this width."""
        blocks = 0
        for other in site.draft.together:
            width, of_other = _width_and_blocks(other)
            if width == self.width:
                blocks += of_other
        return Factors(self.width, rank, form, blocks, site.generator)

    def _bound(self, rank: int, form: str) -> float:
        """The largest initial value of Σ or P, as in the authors' code.

        Σ is the weight of a linear layer, of r inputs for each block in a row. P is Xavier-uniform, one
        matrix for all blocks of the model.
        """
        if form == "tucker":
            return math.sqrt(6 / (rank + self.factors.blocks))
        in_a_row = 1 if self.tall else self.blocks
        return 1 / math.sqrt(in_a_row * rank)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of attentions and layers of MLPs; with a target, each linear or 1×1 layer."""
        for site in network.sites("linear", "conv"):
            if site.kind == "conv" and (
                site.host.shape[2:].numel() > 1 or getattr(site.layer, "groups", 1) > 1
            ):
                continue
            # An MLP inside an attention makes positions of it, as Swin V2's does.
            in_mlp = network.has_role(site.name, "mlp") and not network.layer(site.name).attention
            if targeted or site.parts or in_mlp:
                yield site

    @property
    def factors(self) -> Factors:
        """U, V and the core, which the layers of one width share."""
        return self.shared["factors"]  # type: ignore[return-value]  # as it was made

    def _middle(self) -> Tensor:
        """Compute every Σᵢ, (blocks, r, r)."""
        core = self.factors.core
        if core is None:
            return self.sigma
        return torch.einsum("ij,jkl->ikl", self.sigma, core)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute y + s·[V·Σᵢ·Uᵀ]·x, (…, out)."""
        x = cast(x, self.sigma)
        change = self._stacked(x) if self.tall else self._side_by_side(x)
        return y + (self.scale * change).to(y.dtype)

    def _stacked(self, x: Tensor) -> Tensor:
        """Compute [V·Σᵢ·Uᵀ]·x with the blocks one above the other: (…, d) → (…, out)."""
        matrices = self._middle().flatten(0, 1)  # (blocks, r, r) → (blocks·r, r)
        hidden = self.dropout(F.linear(F.linear(x, self.factors.u.t()), matrices))
        by_block = hidden.unflatten(-1, (self.blocks, -1))  # (…, blocks·r) → (…, blocks, r)
        outputs = F.linear(by_block, self.factors.v).flatten(-2)  # (…, blocks, d) → (…, blocks·d)
        return outputs[..., : self.outputs]

    def _side_by_side(self, x: Tensor) -> Tensor:
        """Compute [V·Σᵢ·Uᵀ]·x with the blocks side by side: (…, in) → (…, d)."""
        missing = self.blocks * self.width - self.inputs
        if missing:
            x = F.pad(x, (0, missing))
        by_block = x.unflatten(-1, (self.blocks, -1))  # (…, blocks·d) → (…, blocks, d)
        hidden = F.linear(by_block, self.factors.u.t()).flatten(-2)  # (…, blocks, r) → (…, blocks·r)
        # (blocks, r, r) → (r, blocks, r) → (r, blocks·r)
        matrices = self._middle().transpose(0, 1).flatten(1)
        return F.linear(self.dropout(F.linear(hidden, matrices)), self.factors.v)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + s·[V·Σᵢ·Uᵀ], the blocks one above the other in a tall weight, else side by side."""
        assert weight is not None
        blocks = self.factors.v @ self._middle() @ self.factors.u.t()
        side = 0 if self.tall else 1
        change = torch.cat(list(blocks), side)[: self.outputs, : self.inputs]
        return weight + self.scale * change.view_as(weight), bias


def _width_and_blocks(site: Site) -> tuple[int, int]:
    """Width d of the blocks of a site's weight, and how many there are."""
    sides = site.host.flatten(1).shape  # (out, in, 1, …) → (out, in)
    width = min(sides)
    return width, math.ceil(max(sides) / width)
