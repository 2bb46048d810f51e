"""FacT: the changes of all weights as one tensor, held in factors that the layers share.

Jie & Deng, "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer" (AAAI 2023), arXiv 2212.03145, there
FacT-TT (tensor train) and FacT-TK (Tucker).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.registry import register
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import require_choice, require_positive


class Factors(nn.Module):
    """U and V, (d, r) each, and for Tucker the core C, (r, r, r): what all blocks of width d have in common."""

    def __init__(self, width: int, rank: int, form: str, generator: torch.Generator | None) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(width, rank))
        self.v = nn.Parameter(torch.zeros(width, rank))
        self.core = nn.Parameter(torch.empty(rank, rank, rank)) if form == "tucker" else None
        nn.init.uniform_(self.u, -(width**-0.5), width**-0.5, generator=generator)
        if self.core is not None:
            nn.init.xavier_uniform_(self.core, generator=generator)


@register(
    "fact",
    hint="it adapts the attentions and MLPs of transformers. Try 'lora' or 'ssf'.",
    search={"scale": (0.01, 0.1, 1.0, 10.0, 100.0), "rank": (4, 8, 16, 32)},
)
class FacT(Adapter):
    """The change of every weight as a stack of d×d blocks V·Σᵢ·Uᵀ, of which all layers share U and V: W + s·[V·Σᵢ·Uᵀ].

    d is the smaller side of the weight: a query, key or value is one block, an MLP's layer of 4d four, one above the other or
    side by side; blocks that jut out are cut off. V starts at zero.

    Args:
        site: A linear layer or 1×1 convolution of an attention or MLP, or the `in_proj_weight` of an attention.
        rank: r.
        scale: s.
        form: "tt", a tensor train, where every block has its own Σᵢ, (r, r); or "tucker", where it is a combination of r
            matrices common to all blocks: Σᵢ = Σⱼ Pᵢⱼ·Cⱼ.
    """

    def __init__(self, site: Site, *, rank: int = 16, scale: float = 1.0, form: str = "tt") -> None:
        super().__init__(site)
        require_positive("rank", rank)
        require_choice("form", form, ("tt", "tucker"))
        self.outputs, self.inputs = site.host.flatten(1).shape
        self.width, self.scale = min(self.outputs, self.inputs), float(scale)
        self.blocks = -(-max(self.outputs, self.inputs) // self.width)
        # First the shared ones: what they start from must not depend on the layer's own.
        self.shared["factors"] = site.share(self.width, lambda: Factors(self.width, rank, form, site.generator))
        self.sigma = nn.Parameter(torch.empty(self.blocks, rank, *([rank] if form == "tt" else [])))
        bound = rank**-0.5 if form == "tt" else (6 / (rank + self.blocks)) ** 0.5
        nn.init.uniform_(self.sigma, -bound, bound, generator=site.generator)
        if site.kind != "linear":
            self.acts_on = ON_WEIGHT

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """All projections of every attention and all layers of every MLP; with a target, each linear or 1×1 layer."""
        for site in network.sites("linear", "conv"):
            if site.kind == "conv" and (site.host[0, 0].numel() > 1 or getattr(site.layer, "groups", 1) > 1):
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
        """Every Σᵢ, (blocks, r, r)."""
        core = self.factors.core
        return self.sigma if core is None else torch.einsum("ij,jkl->ikl", self.sigma, core)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s·[V·Σᵢ·Uᵀ]·x, (…, out)."""
        u, v, middle, x = self.factors.u, self.factors.v, self._middle(), cast(x, self.sigma)
        if self.outputs >= self.inputs:
            hidden = F.linear(F.linear(x, u.t()), middle.flatten(0, 1)).unflatten(-1, (self.blocks, -1))
            change = F.linear(hidden, v).flatten(-2)[..., : self.outputs]
        else:
            missing = self.blocks * self.width - self.inputs
            blocks = (F.pad(x, (0, missing)) if missing else x).unflatten(-1, (self.blocks, -1))
            change = F.linear(F.linear(F.linear(blocks, u.t()).flatten(-2), middle.transpose(0, 1).flatten(1)), v)
        return y + (self.scale * change).to(y.dtype)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + s·[V·Σᵢ·Uᵀ], the blocks one above the other in a tall weight, side by side in a wide one."""
        assert weight is not None
        blocks = self.factors.v @ self._middle() @ self.factors.u.t()
        change = torch.cat(list(blocks), 0 if self.outputs >= self.inputs else 1)[: self.outputs, : self.inputs]
        return weight + self.scale * change.view_as(weight), bias
