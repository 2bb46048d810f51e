"""The residual stream of a transformer block: where it enters the MLP; its change in the block's shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..architecture.blocks import Branches
from ..architecture.site import Partner, Site


def before_mlp(
    block: Branches, paths: Iterable[str], make: Callable[[Site, Any], nn.Module]
) -> tuple[Partner, ...]:
    """Make second places at modules below a block that the stream enters, as the norm before its MLP."""
    partners = []
    for path in paths:
        module = block.module.get_submodule(path)
        partners.append(Partner(Site(f"{block.name}.{path}", module, "", "", layout=block.stream), make))
    return tuple(partners)


def in_shape_of(y: Tensor, change: Tensor) -> Tensor:
    """View `change` in the shape of `y`, with zeros for tokens that the MLP does not see."""
    if change.ndim == y.ndim == 3 and change.shape[1] < y.shape[1]:
        # The class blocks of XCiT and VOLO run their MLP on the class token alone, which comes first.
        unseen = y.shape[1] - change.shape[1]
        return F.pad(change, (0, 0, 0, unseen))  # (B, 1, D) → (B, N, D)
    return change.reshape(y.shape)  # such as (B, D, H·W) → (B, D, H, W)
