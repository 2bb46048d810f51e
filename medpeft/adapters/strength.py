"""Values between those of the base and the trained ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..architecture.layers import is_differentiable
from ..sharding import like


@torch.no_grad()
def between(
    base: Mapping[str, Tensor], trained: Mapping[str, Tensor], strength: float | None
) -> Mapping[str, Tensor]:
    """Compute base + strength · (trained − base), by name; at 0 and at 1 the very values.

    Counts, which are whole numbers, are the base's at 0 and else the trained ones.

    Args:
        base: The values of the base.
        trained: The trained values, by the same names and more.
        strength: The strength; None is 0.
    """
    if not strength:
        return base
    values = {}
    for name, before in base.items():
        after = trained[name].detach()
        values[name] = after
        if strength != 1 and is_differentiable(after):
            values[name] = _between(like(before.to(after.device), after), after, strength)
    return values


def _between(before: Tensor, after: Tensor, strength: float) -> Tensor:
    """Compute a value in float32 or wider, and round it once."""
    wide = torch.promote_types(after.dtype, torch.float32)
    start = before.to(wide)
    return (start + strength * (after.to(wide) - start)).to(after.dtype)
