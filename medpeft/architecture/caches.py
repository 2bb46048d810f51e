"""Values that a layer computes once from its parameters, and keeps for as long as it is in eval mode.

LeViT and others look up their attention biases so (timm's `levit.py`, `efficientformer.py`, `tiny_vit.py`,
`efficientvit_msra.py`; transformers' `modeling_levit.py`). Whoever writes other values into a model empties
these caches, or the layer computes on with the values before.
"""

from __future__ import annotations

from torch import nn

CACHE = "attention_bias_cache"
"""Name of the attribute with a dict of values by device."""


def empty_caches(model: nn.Module) -> None:
    """Let every layer compute anew what it keeps of its parameters.

    A layer gets another dict, since copies that share all attributes may hold the one that it has.
    """
    for module in model.modules():
        if module.__dict__.get(CACHE):
            module.__dict__[CACHE] = {}
