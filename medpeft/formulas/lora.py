"""LoRA: a low-rank change of the weight.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), arXiv 2106.09685, Eq. 3.

Options from:

- Kalajdzievski, rsLoRA (2023), arXiv 2312.03732
- Liu et al., DoRA (2024), arXiv 2402.09353, Eq. 5 and 11
- Meng, Wang & Zhang, PiSSA (2024), arXiv 2404.02948
- Büyükakyüz, OLoRA (2024), arXiv 2406.01775
- Paischer et al., EVA (2024), arXiv 2410.07170
- Zhang et al., LoRA-FA (2023), arXiv 2308.03303
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_WEIGHT, DroppingAdapter, JoiningAdapter, along, cast, tensor_of
from ..adapters.in_place import in_place, writes_fresh_output
from ..adapters.kernels import add_low_rank, add_pointwise
from ..adapters.linear_low_rank import linear_with_low_rank
from ..adapters.options import Count, Factor, Parts, Probability
from ..adapters.registry import register
from ..architecture.convolution import Geometry, is_affine, slides_plainly
from ..architecture.network import Network
from ..architecture.rows import evenly_spaced, part_sizes, place_channels, replace_rows, take_rows
from ..architecture.site import Site
from ..errors import require
from .dora import row_norms, stretch
from .lora_starts import BY_CHANCE, FROM_WEIGHT, Init, draw_down, factors, require_inputs_seen


@register(
    "lora",
    hint="without a target it adapts attentions or convolutions. Try target='linear', or 'ssf'.",
    fast=("up",),
    search={"rank": (2, 4, 8, 16, 32), "dora": (False, True)},
    by_image=True,
)
class LoRA(DroppingAdapter, JoiningAdapter):
    """A low-rank change of the weight: W + (α/r)·B·A, by default of every query and value projection.

    A is (r, fan-in) and B (out, r), on the weight taken as a matrix. In a fused projection every adapted part
    has its own. A convolution runs as two: A at the host's stride, padding and dilation, then B as 1×1. Of a
    grouped one the weight itself is changed.

    Args:
        site: A linear, convolution or embedding layer, or the `in_proj_weight` of an attention.
        rank: r.
        alpha: α; r if None.
        dropout: Probability of dropping an element of the input of A; with `dora` of the input of W' − W. Of
            an embedding, whose input is one-hot, it drops the change of a token.
        init: "kaiming": A from Kaiming-uniform(√5) and B zero. "gaussian": A normal of deviation 1/r.
            "orthogonal": both drawn, their product zero but for rounding. "pissa": both from the singular
            vectors of W / (α/r). "olora": from the QR decomposition of W. Their product is then subtracted,
            so that the base weight keeps its bits. "eva": A from the directions in which what enters the
            layer varies most on the `data` of `apply`, and B zero.
        rslora: Scale by α/√r.
        dora: Learn the norm of every output row apart from its direction; the norm is a constant in backward.
        freeze_a: Train B alone.
        bias: Train a bias of the change as well, (α/r)·b, from zero.

    Attributes:
        starts_from_inputs: Whether `apply` is to look at what enters the layer, for `site.draft.entered`.
    """

    up_start: Tensor
    down_start: Tensor
    joins: bool = False  # Of the class too, for models that were pickled before.

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 8,
        alpha: Factor | None = None,
        dropout: Probability = 0.0,
        init: Init = "kaiming",
        rslora: bool = False,
        dora: bool = False,
        freeze_a: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(site)
        self.rank, self.kind, self.rows = rank, site.kind, site.rows
        self.even_rows = evenly_spaced(site.rows)
        self.scale = _scale(rank, alpha, rslora)
        self.drops, self.dropout = dropout > 0, nn.Dropout(dropout)
        self.geometry: Geometry | None = None
        if site.kind == "conv":
            self.geometry = Geometry.of(site.layer)  # type: ignore[arg-type]  # by its kind
        self.padding: int | None = getattr(site.layer, "padding_idx", None)
        matrix = site.host.flatten(1)
        self._make_factors(site, matrix, init)
        self.down.requires_grad_(not freeze_a)
        self.magnitude: nn.Parameter | None = None
        if dora:
            self.magnitude = nn.Parameter(row_norms(take_rows(matrix, self.rows)))
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = _new_bias(site)
        self._choose_place(site, dora=dora)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, parts: Parts = "qv") -> Iterator[Site]:
        """Yield the chosen parts of every attention: q, k, v or the output o; in a CNN, all convolutions."""
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

    def _make_factors(self, site: Site, matrix: Tensor, init: str) -> None:
        """Make A and B; where they start from W, keep a frozen copy of both, whose product is subtracted."""
        self.sizes = part_sizes(self.rows, len(matrix))
        self.down = nn.Parameter(torch.empty(self.rank * len(self.sizes), matrix.shape[1]))
        self.up = nn.Parameter(torch.zeros(sum(self.sizes), self.rank))
        draw_down(self.down, self.rank, init, site.generator)
        self.starts_from_weight = init in FROM_WEIGHT
        self.starts_from_inputs = init == "eva"
        if init in BY_CHANCE:
            return
        if self.starts_from_inputs:
            require_inputs_seen(site)
        require(
            not self.starts_from_weight or 0 < self.scale < float("inf"),
            f"init={init!r} needs a finite alpha above 0: the factor of B·A would be {self.scale:g}.",
        )
        ups, downs = [], []
        wide = take_rows(matrix, self.rows).to(torch.promote_types(matrix.dtype, torch.float32))
        for part in wide.split(self.sizes):
            up, down = factors(site, part, self.rank, init, self.scale)
            ups.append(up)
            downs.append(down)
        self.up = nn.Parameter(torch.cat(ups))
        self.down = nn.Parameter(torch.cat(downs))
        if self.starts_from_weight:
            self.register_buffer("up_start", self.up.detach().clone())
            self.register_buffer("down_start", self.down.detach().clone())

    def _choose_place(self, site: Site, *, dora: bool) -> None:
        """Choose between the output and the weight, and whether the output is written into."""
        grouped = self.geometry is not None and self.geometry.groups > 1
        slides_oddly = site.kind == "conv" and not slides_plainly(site.layer)
        # An embedding with a `max_norm` shortens what it has looked up, so a change of its output is another.
        shortens = getattr(site.layer, "max_norm", None) is not None
        # A grouped convolution's weight is small. A on every group costs ten times the step of a depthwise
        # network.
        if dora or site.kind == "transposed" or slides_oddly or shortens or grouped:
            self.acts_on = ON_WEIGHT
        require(
            self.acts_on != ON_WEIGHT or not self.drops or self._can_drop(site),
            f"dropout={self.dropout.p!r} cannot act at {site.name}, where LoRA changes the weight itself, "
            "and no input can be dropped for that change alone (an embedding, a standardised convolution, a "
            "layer with a forward of its own, or a weight that its parent reads): use dropout=0.",
        )
        parts_lie_whole = all(part.groups == 1 for part in self.rows)
        parts_lie_whole = parts_lie_whole and (site.kind == "linear" or not self.rows)
        adds_product_alone = not self.starts_from_weight and self.bias is None
        self.fits_kernels = parts_lie_whole and adds_product_alone and writes_fresh_output(site.layer)
        self.joins = self.fits_kernels and self.acts_on != ON_WEIGHT

    @staticmethod
    def _can_drop(site: Site) -> bool:
        """Whether a change of the weight can act on another input than the weight does."""
        return not site.only_weight and is_affine(site.layer)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s·(B·A·drop(x) + b), in the channels of the chosen parts."""
        down, up = self.down, self.up
        if self.fits_kernels and x.dtype == y.dtype == down.dtype and in_place(y):
            return self._add_in_place(x, y, down, up)
        if self.kind != "embedding":
            x = self.dropout(cast(x, down))
        change = self._change(x, down, up, y.dtype)
        if self.starts_from_weight:
            change = change - self._change(x, self.down_start, self.up_start, y.dtype)
        if self.kind == "embedding" and self.drops:
            change = change * self.dropout(torch.ones_like(x, dtype=change.dtype))[..., None]  # (…) → (…, 1)
        channel_axis = -1
        if self.geometry is not None:
            channel_axis = self.geometry.channel_axis
        if self.bias is not None:
            change = change + along(self.scale * self.bias, change, channel_axis).to(change.dtype)
        return y + place_channels(change, self.rows, y, channel_axis)

    def with_layer(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """Compute a linear layer and the change in one step, where nothing is dropped."""
        if not self.joins or (self.drops and self.dropout.training):
            return None
        down, up = tensor_of(self, "down"), tensor_of(self, "up")
        return linear_with_low_rank(layer, x, down, up, self.scale, self.rows, self.even_rows)

    def _add_in_place(self, x: Tensor, y: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """Add the change to `y`, part by part."""
        if self.drops:
            x = self.dropout(x)
        if self.geometry is not None:
            hidden = self.geometry.convolve(x, self.geometry.as_kernel(down))
            return add_pointwise(y, hidden, up, self.scale, self.geometry.channel_axis)
        return add_low_rank(y, x, down, up, self.scale, self.rows, self.even_rows)

    def _change(self, x: Tensor, down: Tensor, up: Tensor, dtype: torch.dtype) -> Tensor:
        """s·B·A·x, the channels of the parts one after the other."""
        if self.kind == "embedding":
            change = F.embedding(x, up) @ down
            if self.padding is not None:  # Its row gets no gradient, as in the layer.
                change = torch.where((x == self.padding)[..., None], change.detach(), change)
        elif self.geometry is not None:
            change = self._convolved(x, down, up, self.geometry)
        else:
            change = self._projected(F.linear(x, down), up)
        return (self.scale * change).to(dtype)

    def _projected(self, hidden: Tensor, up: Tensor) -> Tensor:
        """B·h, every part from its own r channels: (…, parts·r) → (…, channels of the parts)."""
        if len(self.sizes) == 1:
            return F.linear(hidden, up)
        projected = []
        for of_part, up_of_part in zip(hidden.split(self.rank, -1), up.split(self.sizes), strict=True):
            projected.append(F.linear(of_part, up_of_part))
        return torch.cat(projected, -1)

    def _convolved(self, x: Tensor, down: Tensor, up: Tensor, geometry: Geometry) -> Tensor:
        """A as a convolution, then B as a 1×1 one."""
        hidden = geometry.convolve(x, geometry.as_kernel(down))
        if len(self.sizes) == 1:
            return geometry.pointwise(hidden, up, strided=False)
        # (N, parts·r, …) → (N, …, parts·r), and back with the channels of the parts
        axis = geometry.channel_axis
        return self._projected(hidden.movedim(axis, -1), up).movedim(-1, axis)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + s·B·A; with DoRA m·(W + s·B·A)/‖W + s·B·A‖, row by row."""
        assert weight is not None
        change = self._product(self.down, self.up)
        if self.starts_from_weight:
            change = change - self._product(self.down_start, self.up_start)
        matrix = weight.flatten(1)  # (out, in, …) → (out, fan-in)
        new = take_rows(matrix, self.rows) + self.scale * change
        if self.magnitude is not None:
            # Measured in the precision in which W was, which the adapter's own may exceed.
            measured = new.detach().to(torch.promote_types(weight.dtype, torch.float32))
            new = new * stretch(self.magnitude, measured)[:, None]
        return replace_rows(matrix, self.rows, new).view_as(weight), self._shifted(bias, len(matrix))

    def _shifted(self, bias: Tensor | None, outputs: int) -> Tensor | None:
        """The layer's bias and s·b; a new one where the layer has none."""
        if self.bias is None:
            return bias
        shift = self.scale * self.bias
        if bias is None and not self.rows:
            return shift
        if bias is None:
            bias = shift.new_zeros(outputs)
        return replace_rows(bias, self.rows, take_rows(bias, self.rows) + shift)

    def _product(self, down: Tensor, up: Tensor) -> Tensor:
        """B·A as a matrix, the rows of the parts one after the other."""
        if len(self.sizes) == 1:
            return up @ down
        products = []
        for up_of_part, down_of_part in zip(up.split(self.sizes), down.split(self.rank), strict=True):
            products.append(up_of_part @ down_of_part)
        return torch.cat(products)


def _scale(rank: int, alpha: float | None, rslora: bool) -> float:
    """α/r, or α/√r."""
    if alpha is None:
        alpha = rank
    divisor: float = rank
    if rslora:
        divisor = rank**0.5
    return alpha / divisor


def _new_bias(site: Site) -> nn.Parameter:
    """Make a bias of zeros for the channels that are adapted, where the layer can have one."""
    require(
        site.kind != "embedding" and site.bias != "",
        f"bias=True has no place at {site.name}: an embedding adds no bias, and where a parent reads the "
        "weight alone none of the layer's own is read. Exclude it, or use bias=False.",
    )
    return nn.Parameter(torch.zeros(sum(part_sizes(site.rows, site.output_channels))))
