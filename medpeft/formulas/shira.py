"""SHiRA: few numbers of every weight train, at fixed places, as they are.

Bhardwaj et al., "Sparse High Rank Adapters" (NeurIPS 2024), arXiv 2406.13175, Sec. 3. Its masks by gradient
are those of Zhang et al., "Gradient-based Parameter Selection for Efficient Fine-Tuning" (CVPR 2024),
arXiv 2312.10136.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.options import Count
from ..adapters.registry import register
from ..architecture.layers import outputs_first
from ..architecture.network import Network
from ..architecture.site import Site
from ..errors import MedpeftError
from .whole_weights import projections_or_convolutions


@register(
    "shira",
    hint="it changes the weights of attentions or convolutions. Try target='linear', or 'lora'.",
    search={"rank": (2, 4, 8, 16), "mask": ("random", "magnitude")},
    decays=False,
)
class SHiRA(Adapter):
    """A sparse change of the weight, of any rank, at places that are chosen once: W + scatter(v).

    It has as many numbers as LoRA of rank r, r · (out + fan-in), but no more than the weight. v starts at
    zero. The places are part of the file.

    Args:
        site: A linear layer or a convolution, or the `in_proj_weight` of an attention.
        rank: r.
        mask: The places: "random"; "magnitude", where |W| is largest; "gradient", where the gradient is. For
            that one, run `backward` on the loss of some images before `apply`.
        each_output: Take equally many places of every output, as GPS does, rather than of the whole weight.
    """

    places: Tensor

    def __init__(
        self,
        site: Site,
        *,
        rank: Count = 4,
        mask: Literal["random", "magnitude", "gradient"] = "random",
        each_output: bool = False,
    ) -> None:
        super().__init__(site)
        matrix = site.host.flatten(1)  # (out, in, …) → (out, fan-in)
        outputs, inputs = matrix.shape
        count = min(rank * (outputs + inputs), matrix.numel())
        worth = _worth(site, matrix, mask)
        if each_output:
            of_each = max(1, count // outputs)
            rows = torch.arange(outputs, device=matrix.device)[:, None]
            # (out, K): places within a row, and from there in the whole matrix
            places = (worth.topk(of_each, 1).indices + rows * inputs).flatten()
        else:
            places = worth.flatten().topk(count).indices
        self.register_buffer("places", places)
        self.values = nn.Parameter(torch.zeros(len(places)))

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False) -> Iterator[Site]:
        """Yield all projections of every attention; all convolutions of a CNN."""
        yield from projections_or_convolutions(network, "linear", "conv", "transposed", targeted=targeted)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Compute W + v at its places."""
        assert weight is not None
        flat = weight.flatten()
        return flat.index_add(0, self.places, self.values.to(flat.dtype)).view(weight.shape), bias


def _worth(site: Site, matrix: Tensor, mask: str) -> Tensor:
    """Say of every number of the weight how much it is worth training it; the highest are taken."""
    if mask == "random" or site.draft.from_file or matrix.is_meta:
        drawn = torch.rand(matrix.shape, generator=site.generator)
        return drawn.to(matrix.device)
    if mask == "magnitude":
        return matrix.abs()
    gradient = getattr(getattr(site.layer, site.weight), "grad", None)
    if gradient is None:
        raise MedpeftError(
            f"mask='gradient' needs the gradient of {site.name}.{site.weight}, which has none: run "
            "backward() on the loss of some images before apply, or take mask='magnitude'."
        )
    return outputs_first(site.layer, gradient.detach()).abs().flatten(1)  # (out, in, …) → (out, fan-in)
