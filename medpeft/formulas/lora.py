"""LoRA: a low-rank change of the weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), arXiv 2106.09685, Eq. 3. Options
from: Kalajdzievski, rsLoRA (2023), arXiv 2312.03732; Liu et al., DoRA (2024), arXiv 2402.09353, Eq. 5 and 11;
    Meng, Wang & Zhang,
PiSSA (2024), arXiv 2404.02948; Büyükakyüz, OLoRA (2024), arXiv 2406.01775; Zhang et al., LoRA-FA (2023),
arXiv 2308.03303.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, Adapter, cast
from ..adapters.kernels import AddLowRank, AddPointwise, in_place, writes_fresh_output
from ..adapters.registry import register
from ..architecture.convolution import Geometry, slides_plainly
from ..architecture.network import Network
from ..architecture.rows import part_sizes, place_channels, replace_rows, take_rows
from ..architecture.site import Site
from ..errors import MedpeftError, require, require_choice, require_positive


@register(
    "lora",
    hint="without a target it adapts attentions or convolutions. Try target='linear', or 'ssf'.",
    fast=("up",),
    search={"rank": (2, 4, 8, 16, 32), "dora": (False, True)},
)
class LoRA(Adapter):
    """A low-rank change of the weight: W + (α/r)·B·A, by default of every query and value projection.

    A is (r, fan-in) and B (out, r), on the weight taken as a matrix; in a fused projection every adapted part
    has its own. A convolution runs as two: A at the host's stride, padding, dilation and groups, then B as
    1×1.

    Args:
        site: A linear, convolution or embedding layer, or the `in_proj_weight` of an attention.
        rank: r.
        alpha: α; r if None.
        dropout: Probability of dropping an element of the input of A.
        init: A from Kaiming-uniform(√5) and B zero ("kaiming"), or both from W's singular vectors ("pissa")
            or QR decomposition ("olora"), whose product is then taken off, so that the base weight keeps its
            bits.
        rslora: Scale by α/√r.
        dora: Learn the norm of every output row apart from its direction; the norm is a constant in backward.
        freeze_a: Train B alone.
    """

    def __init__(
        self,
        site: Site,
        *,
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        init: str = "kaiming",
        rslora: bool = False,
        dora: bool = False,
        freeze_a: bool = False,
    ) -> None:
        super().__init__(site)
        require_positive("rank", rank)
        require_choice("init", init, ("kaiming", "pissa", "olora"))
        require(0.0 <= dropout < 1.0, f"dropout={dropout!r} must be at least 0 and below 1.")
        matrix = site.host.flatten(1)
        self.rank, self.kind, self.rows = rank, site.kind, site.rows
        self.scale = (rank if alpha is None else alpha) / (rank**0.5 if rslora else rank)
        self.dropout = nn.Dropout(dropout)
        self.geometry = Geometry.of(site.layer) if site.kind == "conv" else None  # type: ignore[arg-type]  # a conv
        sizes = part_sizes(self.rows, matrix.shape[0])
        self.down = nn.Parameter(torch.empty(rank * len(sizes), matrix.shape[1]))
        self.up = nn.Parameter(torch.zeros(sum(sizes), rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5, generator=site.generator)
        self.start = init != "kaiming"
        if self.start:
            self._start_from(matrix, init)
        self.magnitude = nn.Parameter(_row_norms(take_rows(matrix, self.rows))) if dora else None
        self.down.requires_grad_(not freeze_a)
        contiguous = all(row.groups == 1 for row in self.rows) and (site.kind != "conv" or not self.rows)
        ungrouped = self.geometry is None or self.geometry.groups == 1
        self.simple = contiguous and ungrouped and not self.start and writes_fresh_output(site.layer)
        slides_oddly = site.kind == "conv" and not slides_plainly(site.layer)
        # A grouped convolution's weight is small; A on every group of inputs costs ten times the step of a
        # depthwise network.
        cheaper = not ungrouped and dropout == 0
        if dora or site.kind == "transposed" or slides_oddly or cheaper:
            self.acts_on = ON_WEIGHT
        require(
            self.acts_on != ON_WEIGHT or dropout == 0.0,
            f"dropout={dropout!r} cannot act at {site.name}, where LoRA changes the weight itself "
            f"(dora=True, a transposed or standardised convolution, or a weight that its parent reads): use dropout=0.",
        )

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, parts: str = "qv") -> Iterator[Site]:
        """The chosen parts (of q, k, v and the output projection o) of every attention; every convolution of a CNN."""
        require(bool(parts) and set(parts) <= set("qkvo"), f"parts={parts!r} must be letters of 'qkvo'.")
        convolutional = not network.attentions
        for site in network.sites("linear", "conv", "transposed", "embedding"):
            inner = set(site.parts) & set("qkv")
            if inner and not inner & set(parts):
                continue
            by_default = (
                inner or ("o" in site.parts and "o" in parts) or (convolutional and site.kind == "conv")
            )
            if targeted or by_default:
                yield site.with_parts(parts)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s·B·A·drop(x); the channels of the chosen parts alone in a fused projection."""
        if self.kind == "embedding":
            return y + self._change(x, y, self.down, self.up)
        x = self.dropout(cast(x, self.down))
        if self.simple and x.dtype == y.dtype and in_place(y):
            return self._add_in_place(x, y)
        change = self._change(x, y, self.down, self.up)
        if self.start:
            change = change - self._change(x, y, self.down_start, self.up_start)
        return y + change

    def _add_in_place(self, x: Tensor, y: Tensor) -> Tensor:
        """The same, written into `y` part by part."""
        if self.kind == "conv":
            assert self.geometry is not None
            hidden = self.geometry.convolve(x, self.down.view(self.rank, -1, *self.geometry.kernel))
            out: Tensor = AddPointwise.apply(y, hidden, self.up, self.scale)
            return out
        starts = [row.start for row in self.rows] or [0]
        ups = self.up.split([row.size for row in self.rows] or [len(self.up)])
        for start, down, up in zip(starts, self.down.split(self.rank), ups, strict=True):
            y = AddLowRank.apply(y, x, down, up, self.scale, start)
        return y

    def _change(self, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """s·B·A·x in the shape and dtype of `y`."""
        axis = 1 if self.kind == "conv" else -1
        if self.kind == "embedding":
            change = F.embedding(x, up) @ down
        elif self.kind == "conv":
            change = self._convolved(x, down, up)
        else:
            change = self._projected(F.linear(x, down), up)
        change = (self.scale * change).to(y.dtype)
        return place_channels(change, self.rows, y, axis)

    def _projected(self, hidden: Tensor, up: Tensor) -> Tensor:
        """B·h, every part from its own r channels of h, (…, sum of the parts' sizes)."""
        if len(self.rows) < 2:
            return F.linear(hidden, up)
        sizes = [row.size * row.groups for row in self.rows]
        parts = zip(hidden.split(self.rank, -1), up.split(sizes), strict=True)
        return torch.cat([F.linear(h, u) for h, u in parts], -1)

    def _convolved(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        assert self.geometry is not None
        groups, dims = self.geometry.groups, self.geometry.dims
        kernel = down.view(len(down), -1, *self.geometry.kernel)
        if groups > 1:  # Every group of inputs meets the same A.
            x = x.unflatten(1, (groups, -1)).flatten(0, 1)
        hidden = self.geometry.convolve(x, kernel)
        if groups > 1:
            hidden = hidden.unflatten(0, (-1, groups)).flatten(1, 2)
        if len(self.rows) < 2:
            return self.geometry.pointwise(hidden, up, groups, strided=False)
        moved = self._projected(hidden.movedim(1, -1), up)
        return moved.movedim(-1, -1 - dims)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + s·B·A; with DoRA m·(W + s·B·A)/‖W + s·B·A‖, row by row."""
        assert weight is not None
        change = self._delta(self.down, self.up)
        if self.start:
            change = change - self._delta(self.down_start, self.up_start)
        matrix = weight.flatten(1)
        new = take_rows(matrix, self.rows) + self.scale * change
        if self.magnitude is not None:
            new = new * (self.magnitude / _row_norms(new.detach()))[:, None]
        return replace_rows(matrix, self.rows, new).view_as(weight), bias

    def _delta(self, down: Tensor, up: Tensor) -> Tensor:
        """B·A as a matrix, the rows of the adapted parts one after the other."""
        if len(self.rows) < 2:
            return up @ down
        sizes = [row.size * row.groups for row in self.rows]
        return torch.cat([u @ d for u, d in zip(up.split(sizes), down.split(self.rank), strict=True)])

    def _start_from(self, matrix: Tensor, init: str) -> None:
        """B and A from W, and a frozen copy of both whose product is taken off."""
        wide = take_rows(matrix, self.rows).to(torch.promote_types(matrix.dtype, torch.float32))
        sizes = part_sizes(self.rows, len(wide))
        pairs = [_factors(part, self.rank, init) for part in wide.split(sizes)]
        self.up = nn.Parameter(torch.cat([up for up, _ in pairs]) / self.scale**0.5)
        self.down = nn.Parameter(torch.cat([down for _, down in pairs]) / self.scale**0.5)
        self.register_buffer("up_start", self.up.detach().clone())
        self.register_buffer("down_start", self.down.detach().clone())

    up_start: Tensor
    down_start: Tensor


def _factors(matrix: Tensor, rank: int, init: str) -> tuple[Tensor, Tensor]:
    """(out, r) and (r, in): the leading singular triplets, or the first columns and rows of Q and R."""
    if rank > min(matrix.shape):
        raise MedpeftError(
            f"rank={rank} is more than a weight of {tuple(matrix.shape)} has: use init='kaiming'."
        )
    if init == "olora":
        q, r = torch.linalg.qr(matrix)
        return q[:, :rank], r[:rank]
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=1)
    return norms
