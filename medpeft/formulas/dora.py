"""DoRA's norms: every row of a weight has a norm that is learned apart from its direction.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (ICML 2024), arXiv 2402.09353, Eq. 5.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stretch(magnitude: Tensor, matrix: Tensor) -> Tensor:
    """m/‖W‖, row by row: exactly 1 where m is the norm of the row, in whatever dtype m is kept."""
    norms = row_norms(matrix).to(magnitude.dtype)
    zero = norms == 0  # A row without direction, as a padding token's, is left as it is.
    return (magnitude / norms.masked_fill(zero, 1)).masked_fill(zero, 1)


def row_norms(matrix: Tensor) -> Tensor:
    """‖W‖, row by row, in float32 or wider."""
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    norms: Tensor = torch.linalg.vector_norm(wide, dim=1)
    return norms
