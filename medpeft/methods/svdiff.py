"""SV-Diff. Han et al., "SVDiff: Compact Parameter Space for Diffusion Fine-Tuning" (ICCV 2023), arXiv 2303.11305, Eq. 2 and 3."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site
from ..registry import register
from ..targets import Network


@register("svdiff", hint="it shifts the singular values of linear and convolution weights. Try 'ssf' or 'bias'.")
class SVDiff(Adapter):
    """Shift of every weight's singular values: W + U·diag(relu(σ + s·δ) − σ)·Vᵀ, which is exactly W at δ = 0.

    W is taken as (out, −1), the vector of a norm as (1, D); the decomposition is done in float32 or wider.

    Args:
        site: A linear, convolution, embedding or norm layer.
        scale: s.
        keep_svd: Keep U, σ and V in the checkpoint; else they are computed anew when it is loaded.
    """

    def __init__(self, site: Site, *, scale: float = 1.0, keep_svd: bool = False) -> None:
        super().__init__(site)
        host = site.host
        matrix = (host.flatten(1) if host.ndim > 1 else host[None]).to(torch.promote_types(host.dtype, torch.float32))
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        self.delta = nn.Parameter(torch.zeros(values.shape[0], device=values.device, dtype=values.dtype))
        self.scale = scale
        for name, tensor in (("left", left), ("values", values), ("right", right)):
            self.register_buffer(name, tensor.contiguous(), persistent=keep_svd)

    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, norms: bool = False) -> Iterator[Site]:
        """Linear and convolution layers; norms too with norms=True; embeddings where a target picks them."""
        kinds = ("linear", "conv", "transposed", *(("norm",) if norms else ()), *(("embedding",) if targeted else ()))
        for site in network.sites(*kinds):
            if site.tensor(site.weight) is not None:
                yield site

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """W + U·diag(relu(σ + s·δ) − σ)·Vᵀ."""
        shift = (self.values + self.scale * self.delta).relu() - self.values
        change = (self.left * shift) @ self.right
        return None if weight is None else weight + change.view(weight.shape), bias
