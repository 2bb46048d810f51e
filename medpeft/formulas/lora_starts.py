"""Where the two matrices of LoRA start.

- kaiming: A uniform within 1 / √fan-in, B zero, as Hu et al. have it.
- gaussian: A normal of deviation 1/r, B zero.
- orthogonal: A and B from two halves of the rows of an orthogonal matrix, so that B·A is zero and neither is.
- pissa, olora: the leading singular triplets, or the QR decomposition, of the weight.
- eva: A from the directions in which what enters the layer varies most, B zero.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..architecture.site import Site
from ..errors import MedpeftError, require

Init = Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"]
BY_CHANCE = ("kaiming", "gaussian")
FROM_WEIGHT = ("pissa", "olora")
_ORTHOGONAL_SCALE = 0.1


def draw_down(down: Tensor, rank: int, init: str, generator: torch.Generator | None) -> None:
    """Draw A where B is zero and nothing but chance decides."""
    if init == "gaussian":
        nn.init.normal_(down, std=1 / rank, generator=generator)
    else:
        nn.init.kaiming_uniform_(down, a=5**0.5, generator=generator)


def factors(site: Site, part: Tensor, rank: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """Make B, (out, r), and A, (r, fan-in), for one part of a weight, (out, fan-in).

    Raises:
        MedpeftError: the rank is one from which there is no such start, or data are needed and missing.
    """
    if init == "orthogonal":
        require(rank % 2 == 0, f"init='orthogonal' halves the rank, and rank={rank} is odd.")
    if site.draft.from_file:  # The file brings them.
        return part.new_zeros(len(part), rank), part.new_zeros(rank, part.shape[1])
    if init == "orthogonal":
        return _orthogonal(part, rank, site.generator)
    if init == "eva":
        return part.new_zeros(len(part), rank), _directions(site, part, rank)
    return _leading(part, rank, init, scale)


def require_inputs_seen(site: Site) -> None:
    """Raise unless what enters the layer can be seen: a vector for every token."""
    require(
        site.kind == "linear" and not site.only_weight,
        f"init='eva' starts from what enters a linear layer, and at {site.name} it cannot be seen: it is no "
        "linear layer, or its parent reads its weight. Exclude it, or take another init.",
    )


def _directions(site: Site, part: Tensor, rank: int) -> Tensor:
    if site.draft.shapes_only:
        return part.new_zeros(rank, part.shape[1])
    if site.draft.entered is None:
        raise MedpeftError(
            "init='eva' starts from what enters the layers: pass data= to apply, batches of inputs."
        )
    return site.draft.entered.directions(rank).to(part)  # type: ignore[no-any-return]  # a `Spread`


def _orthogonal(part: Tensor, rank: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """B = Y·Q₂ / 10 and A = Q₁ᵀ·X / 10; Q₁ and Q₂ are every other row of an orthogonal Q, X and Y normal."""
    square = part.new_empty(rank, rank)
    x, y = part.new_empty(rank // 2, part.shape[1]), part.new_empty(len(part), rank // 2)
    nn.init.orthogonal_(square, generator=generator)
    for drawn in (x, y):
        nn.init.normal_(drawn, std=_ORTHOGONAL_SCALE, generator=generator)
    return y @ square[1::2], square[::2].mT @ x


def _leading(part: Tensor, rank: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """B and A from the leading singular triplets of W/s; for "olora" the first columns of Q and rows of R."""
    if rank > min(part.shape):
        raise MedpeftError(
            f"rank={rank} is more than a weight of {tuple(part.shape)} has: use init='kaiming'."
        )
    if init == "olora":
        q, r = torch.linalg.qr(part)
        return q[:, :rank], r[:rank]
    left, values, right = torch.linalg.svd(part, full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]
