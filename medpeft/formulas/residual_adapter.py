"""Residual adapters: a 1×1 convolution beside or after the convolutions of residual blocks.

Rebuffi, Bilen & Vedaldi, "Learning multiple visual domains with residual adapters" (NeurIPS 2017), arXiv
1705.08045, Sec. 3.2, in series; "Efficient parametrization of multi-domain deep neural networks" (CVPR 2018),
arXiv 1803.10082, Sec. 3, in parallel.

In parallel it is the `tsa` of 3×3 convolutions, in series its series without a shift.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ..adapters.registry import register
from ..architecture.layers import CONVS, in_body
from ..architecture.network import Network
from ..architecture.site import Site
from .tsa import TSA, Form, fits_beside

_TSA_FORMS: dict[str, Form] = {"parallel": "matrix", "series": "series"}


@register(
    "residual_adapter",
    hint="it adapts the 3×3 convolutions of residual blocks. Try 'houlsby' or 'lora'.",
    search={"form": ("parallel", "series")},
    by_image=True,
)
class ResidualAdapter(TSA):
    """A 1×1 convolution beside or after the 3×3 ones of residual blocks: conv(x) + α∗x, or y + α∗y.

    The papers give each domain its own BatchNorms as well: join it with "bn" for those.

    Args:
        site: A convolution of I to O channels in G groups.
        form: "parallel", where α is (O, I / G) and grouped like its host, or "series", where it is (O, O).
    """

    def __init__(self, site: Site, *, form: Literal["parallel", "series"] = "parallel") -> None:
        super().__init__(site, form=_TSA_FORMS[form])
        self.bias = None

    @classmethod
    def sites(  # type: ignore[override]  # its options are its own
        cls, network: Network, *, targeted: bool = False, form: Literal["parallel", "series"] = "parallel"
    ) -> Iterator[Site]:
        """Yield the 3×3 convolutions (3×3×3 in volumes) of residual blocks.

        With a target, yield every convolution that a 1×1 fits beside.
        """
        for site in network.sites("conv"):
            if not isinstance(site.layer, CONVS) or not fits_beside(site.layer, form):
                continue
            is_3x3_of_body = set(site.layer.kernel_size) == {3} and in_body(site.name, network.modules)
            if targeted or is_3x3_of_body:
                yield site
