"""Mona: depthwise convolutions of three sizes over the grid of tokens, on the residual stream.

Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks" (CVPR
2025), arXiv 2408.08345, Sec. 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import ON_OUTPUT, Adapter, SecondPlace, cast
from ..adapters.handover import Handover
from ..adapters.options import Count, Probability
from ..adapters.registry import register
from ..architecture.attention import attends_for_class_token
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.site import Layout, Site, Unfit
from ..architecture.trunk import trunk
from ..architecture.windows import reorders_tokens
from ..errors import MedpeftError
from .grid import convolved, filtered, find_grid, on_patches, require_channels
from .stream import before_mlp, in_shape_of
from .two_matrices import TwoMatrices

_SIDES = (3, 5, 7)
_GAMMA = 1e-6


class Progress(NamedTuple):
    """How far one forward of a block has come.

    Attributes:
        sizes: Of the grid, where the block's input has one; else empty.
        added: What was added to the stream before the MLP; None before that.
    """

    sizes: tuple[int, ...]
    added: Tensor | None


class Filters(nn.Module, TwoMatrices):
    """up(drop(gelu(z))), where z are the filtered channels of down(γ ⊙ LN(x) + γ_x ⊙ x).

    On the grid z ← (k₃∗z + k₅∗z + k₇∗z) / 3 + z, depthwise convolutions each with its bias; then z ← z + W·z.
    """

    def __init__(self, site: Site, *, width: int, dropout: float, init: str) -> None:
        super().__init__()
        assert site.layout is not None
        self.dims, channels = site.layout.dims, site.layout.outputs
        self.norm = nn.LayerNorm(channels)
        self.gamma = nn.Parameter(torch.full((channels,), _GAMMA))
        self.gamma_x = nn.Parameter(torch.ones(channels))
        self.add_down(channels, width)
        for side in _SIDES:
            kernel = nn.Parameter(torch.zeros(width, 1, *[side] * self.dims))
            self.register_parameter(f"conv_{side}", kernel)
            self.register_parameter(f"conv_{side}_bias", nn.Parameter(torch.zeros(width)))
        self.mix = nn.Parameter(torch.zeros(width, width))
        self.mix_bias = nn.Parameter(torch.zeros(width))
        self.add_up(width, channels)
        self.dropout = nn.Dropout(dropout)
        self._draw(site.generator, init)

    def _draw(self, generator: torch.Generator | None, init: str) -> None:
        """Draw every matrix and its bias within 1 / √fan-in, as torch does; `up` only with "official"."""
        drawn = ["down", *[f"conv_{side}" for side in _SIDES], "mix"]
        if init == "official":
            drawn.append("up")
        for name in drawn:
            weight = self.get_parameter(name)
            bound = weight[0].numel() ** -0.5
            for parameter in (weight, self.get_parameter(f"{name}_bias")):
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def narrowed(self, tokens: Tensor) -> Tensor:
        """Compute down(γ ⊙ LN(x) + γ_x ⊙ x): (B, …, D) → (B, …, width)."""
        x = cast(tokens, self.down)
        return self.narrow(self.gamma * self.norm(x) + self.gamma_x * x, -1)

    def on_image(self, image: Tensor) -> Tensor:
        """Filter an image, (B, H, W, width): the three convolutions are one, whose kernel is their mean."""
        kernel, bias = self._kernel()
        image = image + convolved(image, kernel, bias, groups=len(kernel))
        return image + F.linear(image, self.mix, self.mix_bias)

    def _kernel(self) -> tuple[Tensor, Tensor]:
        """Average the kernels, each with zeros around it, (width, 1, 7, 7), and the biases."""
        kernels: list[Tensor] = []
        biases: list[Tensor] = []
        for side in _SIDES:
            margin = (_SIDES[-1] - side) // 2
            kernels.append(F.pad(getattr(self, f"conv_{side}"), [margin] * (2 * self.dims)))
            biases.append(getattr(self, f"conv_{side}_bias"))
        return torch.stack(kernels).mean(0), torch.stack(biases).mean(0)

    def widened(self, hidden: Tensor, axis: int) -> Tensor:
        """Compute up(drop(gelu(z))), its channels on an axis."""
        return self.widen(self.dropout(F.gelu(hidden)), axis)


@register(
    "mona",
    hint="it adapts transformer blocks and residual blocks. Try 'lora' or 'ssf'.",
    search={"bottleneck": (16, 32, 64), "dropout": (0.0, 0.1)},
    unmergeable="there is a nonlinearity on the residual stream, which no weight of the layer can replace",
)
class Mona(Adapter):
    """Convolutions of three sizes on the residual stream, after the attention's sum and after the MLP's.

    x + up(drop(gelu(z))), where x is the stream, (B, …, D), and z comes from it by a norm, a matrix,
    depthwise convolutions of 3×3, 5×5 and 7×7 (in volumes cubes) and a 1×1 one. The patches are convolved as
    the whole image that they came from, never within windows; other tokens pass the convolutions by. In a
    network of convolutions x is the output of each residual block.

    Args:
        site: A transformer block, with the norm before its MLP and the MLP as partners, where the stream
            enters; or a residual block.
        bottleneck: Channels of z.
        dropout: Probability before `up`.
        init: "zero" for `up`, so that the model starts as the base, or "official" for a drawn one.
    """

    def __init__(
        self,
        site: Site,
        *,
        bottleneck: Count = 64,
        dropout: Probability = 0.1,
        init: Literal["zero", "official"] = "zero",
    ) -> None:
        super().__init__(site)
        assert site.layout is not None
        self.name, self.layout = site.name, site.layout
        self.after_attention: Filters | None = None
        if site.partners:
            self.after_attention = Filters(site, width=bottleneck, dropout=dropout, init=init)
            self.handover = Handover()
        else:
            self.acts_on = ON_OUTPUT
        self.after_block = Filters(site, width=bottleneck, dropout=dropout, init=init)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site | Unfit]:
        """Yield every transformer block; in a network of convolutions every residual block."""
        blocks = list(branches(network))
        for block in blocks:
            if reorders_tokens(block.name, network.modules):
                yield Unfit(block.name, "gets its tokens in windows, and not in the order of the image")
                continue
            if attends_for_class_token(block.module):
                yield Unfit(block.name, "changes the class token alone, which passes the convolutions by")
                continue
            # In a block that normalises after its MLP, the MLP runs first, and its input is the stream.
            partners = before_mlp(block, (block.norm, block.mlp), BeforeMLP)
            yield Site(block.name, block.module, "", "", layout=block.layout, partners=partners)
        if not blocks:
            yield from trunk(network)

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Note the grid of the block's input, if it has one, and return `x` unchanged."""
        sizes: tuple[int, ...] = ()
        if isinstance(x, Tensor) and x.ndim > 3:
            sizes = tuple(x.movedim(self.layout.axis, -1).shape[1:-1])
        self.handover.leave(Progress(sizes, None))
        return x

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the change before the MLP to the block's output, whose sum lacks it; then the one after it."""
        sizes: tuple[int, ...] = ()
        if self.after_attention is not None:
            progress = self.handover.take(Progress((), None))
            if progress.added is None:
                raise MedpeftError(
                    f"{self.method!r} found no place in {self.name} between its attention and its MLP: "
                    "exclude it, or try 'adapter_plus'."
                )
            sizes = progress.sizes
            y = y + in_shape_of(y, progress.added)
        return y + self.change(self.after_block, y, self.layout.axis, sizes)

    def before_mlp(self, x: Tensor, axis: int) -> Tensor:
        """Compute the stream that enters the MLP, or the norm before it; of both, the first one counts.

        Raises:
            MedpeftError: the block itself does not run, so its output would lack the change.
        """
        progress = self.handover.take(None)
        if progress is None:
            raise MedpeftError(
                f"{self.method!r} changes the stream in the middle of {self.name}, of which a part was run "
                "by itself: call the block as a whole. Where the model checkpoints parts of its blocks, "
                "switch that off (in MONAI's SwinUNETR use_checkpoint=False)."
            )
        if progress.added is not None or self.after_attention is None:
            return x
        change = self.change(self.after_attention, x, axis, progress.sizes)
        self.handover.hand_on(Progress(progress.sizes, change.movedim(axis, self.layout.axis)))
        return x + change

    def change(self, filters: Filters, x: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
        """Compute what is added to a stream `x`, whose channels are on an axis.

        Raises:
            MedpeftError: it has another number of channels than the block's layers say.
        """
        tokens = x.movedim(axis, -1)  # (B, …, D, …) → (B, …, D)
        what = f"{self.method!r} cannot run in {self.name}"
        require_channels(tokens, len(filters.gamma), what, "'lora' or 'ssf'")
        hidden = filters.narrowed(tokens)
        in_row = partial(self._in_row, filters, sizes)
        hidden = filtered(hidden, self.layout, filters.on_image, in_row)
        return filters.widened(hidden, axis).to(x.dtype)

    def _in_row(self, filters: Filters, sizes: tuple[int, ...], hidden: Tensor) -> Tensor:
        """Filter the patches; every other token stays: (B, N, C) → (B, N, C)."""
        layout: Layout = self.layout
        if sizes:
            layout = replace(layout, grid=sizes)
        grid = find_grid(layout, hidden.shape[1])
        if grid is None:
            raise MedpeftError(
                f"{self.method!r} finds no grid in the {hidden.shape[1]} tokens of {self.name}: use images "
                "as high as they are wide, exclude the block, or try 'adapter_plus', which needs no grid."
            )
        return on_patches(hidden, grid, filters.on_image)


class BeforeMLP(SecondPlace):
    """Place where the stream enters the MLP, or the norm before it, after the attention's sum."""

    first: Mona

    def __init__(self, site: Site, first: Mona) -> None:
        super().__init__(site, first)
        assert site.layout is not None
        self.axis = site.layout.axis

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Add to the stream what follows from it."""
        return self.first.before_mlp(x, self.axis)
