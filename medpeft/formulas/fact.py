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
from ..adapters.options import Count, Factor
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site


class Factors(nn.Module):
    """U and V, (d, r) each, and for Tucker the core C, (r, r, r), which all blocks of width d share."""

    def __init__(self, width: int, rank: int, form: str, generator: torch.Generator | None) -> None:
        super().__init__()
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
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 16,
        scale: Factor = 1.0,
        form: Literal["tt", "tucker"] = "tt",
    ) -> None:
        super().__init__(site)
        self.outputs, self.inputs = site.host.flatten(1).shape  # (out, in, 1, …) → (out, in)
        self.tall = self.outputs >= self.inputs
        self.width, self.scale = min(self.outputs, self.inputs), float(scale)
        self.blocks = math.ceil(max(self.outputs, self.inputs) / self.width)
        # The shared factors first: their initial values must not depend on the layer's own.
        width = self.width
        self.shared["factors"] = site.share(width, lambda: Factors(width, rank, form, site.generator))
        if form == "tt":
            self.sigma = nn.Parameter(torch.empty(self.blocks, rank, rank))
            bound = rank**-0.5
        else:
            self.sigma = nn.Parameter(torch.empty(self.blocks, rank))
            bound = (6 / (rank + self.blocks)) ** 0.5
        nn.init.uniform_(self.sigma, -bound, bound, generator=site.generator)
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT

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
        hidden = F.linear(F.linear(x, self.factors.u.t()), matrices)
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
        return F.linear(F.linear(hidden, matrices), self.factors.v)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + s·[V·Σᵢ·Uᵀ], the blocks one above the other in a tall weight, else side by side."""
        assert weight is not None
        blocks = self.factors.v @ self._middle() @ self.factors.u.t()
        side = 0 if self.tall else 1
        change = torch.cat(list(blocks), side)[: self.outputs, : self.inputs]
        return weight + self.scale * change.view_as(weight), bias
