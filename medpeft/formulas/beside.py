"""A stream beside the trunk: what `lst` and `dtl` have in common.

The adapter of every block gets the stream from the one before and hands it on, (B, …, C) with the channels
last. Where the blocks change from one stage to the next, the stream follows: it is averaged to their grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapters.adapter import Adapter
from ..adapters.handover import Handover
from ..architecture.network import Network
from ..architecture.site import Site, Unfit
from ..architecture.trunk import trunk
from ..errors import MedpeftError
from .grid import Grid, find_grid, require_channels

HINT = "it runs beside transformer blocks or residual blocks. Try 'lora' or 'ssf'."
UNMERGEABLE = "it runs beside the blocks of the model, and no weight of theirs computes the same"

_AVERAGE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


class BesideTrunk(Adapter):
    """An adapter of one block that takes a stream from the block before, and hands it on to the next.

    Args:
        site: A block of the trunk.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.layout is not None
        names = [other.name for other in site.draft.together]
        self.name, self.layout = site.name, site.layout
        self.index, self.blocks = names.index(site.name), len(names)
        self.handover: Handover = site.draft.handover

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterable[Site | Unfit]:
        """Yield every block of the trunk."""
        return trunk(network)

    @property
    def is_last(self) -> bool:
        """Whether this is the last block beside which the stream runs."""
        return self.index == self.blocks - 1

    def hand_on(self, stream: Tensor) -> None:
        """Leave the stream for whoever comes next."""
        self.handover.hand_on((self.index, stream))

    def handed(self, index: int) -> Tensor:
        """Take the stream that the adapter of that index has left.

        Raises:
            MedpeftError: it has left none in this forward.
        """
        left_by, stream = self.handover.take((None, None))
        if left_by != index:
            raise MedpeftError(
                f"{self.method!r} at {self.name} was handed nothing by the block before: call the model as a "
                "whole and not a part of it (timm's forward_features), and without activation checkpointing, "
                "which runs blocks by themselves; beside a frozen trunk it would save nothing."
            )
        taken: Tensor = stream
        return taken

    def channels_last(self, x: Tensor, channels: int) -> Tensor:
        """View what enters or leaves the block as (B, …, C).

        Raises:
            MedpeftError: it has another number of channels than the block's layers say.
        """
        seen = x.movedim(self.layout.axis, -1)  # (B, C, H, W) → (B, H, W, C)
        if self.layout.sequence == 0:
            seen = seen.transpose(0, 1)  # (N, B, C) → (B, N, C)
        require_channels(seen, channels, f"{self.method!r} cannot run beside {self.name}", "'lora' or 'tsa'")
        return seen

    def as_in_block(self, stream: Tensor) -> Tensor:
        """View a stream, (B, …, C), as what enters or leaves the block."""
        if self.layout.sequence == 0:
            return stream.transpose(0, 1)  # (B, N, C) → (N, B, C)
        return stream.movedim(-1, self.layout.axis)  # (B, H, W, C) → (B, C, H, W)

    def following(self, stream: Tensor, sizes: Sequence[int]) -> Tensor:
        """Average a stream to the tokens or the grid of a block: (B, …, C) → (B, *sizes, C)."""
        if tuple(stream.shape[1:-1]) == tuple(sizes):
            return stream
        here, there = self._grid(stream.shape[1:-1]), self._grid(sizes)
        if here.prefix != there.prefix or len(here.sizes) != len(there.sizes) or not here.sizes:
            raise self._lost(stream.shape[1:-1], sizes)
        tokens = stream.flatten(1, -2)  # (B, H, W, C) → (B, H·W, C)
        patches = tokens[:, here.prefix :].unflatten(1, here.sizes)  # (B, H·W, C) → (B, H, W, C)
        image = patches.movedim(-1, 1)  # (B, H, W, C) → (B, C, H, W)
        average = _AVERAGE[len(here.sizes)]
        image = average(image, there.sizes).movedim(1, -1)  # type: ignore[arg-type]  # torch names fewer
        if len(sizes) > 1:
            return image
        return torch.cat([tokens[:, : here.prefix], image.flatten(1, -2)], 1)  # (B, H, W, C) → (B, N, C)

    def _grid(self, sizes: Sequence[int]) -> Grid:
        if len(sizes) > 1:
            return Grid(0, tuple(sizes))
        grid = find_grid(self.layout, sizes[0])
        if grid is None:
            raise self._lost(sizes, sizes)
        return grid

    def _lost(self, here: Sequence[int], there: Sequence[int]) -> MedpeftError:
        return MedpeftError(
            f"{self.method!r} cannot follow the trunk to {self.name}, from tokens {tuple(here)} to "
            f"{tuple(there)}: it finds no grid in them. Use images as high as they are wide, or take the "
            "blocks of one stage by target."
        )


def as_wide(stream: Tensor, channels: int) -> Tensor:
    """Give a stream another number of channels: new ones are zero, or the last are left out."""
    missing = channels - stream.shape[-1]
    if missing == 0:
        return stream
    return F.pad(stream, (0, missing))  # (B, …, C) → (B, …, channels)
