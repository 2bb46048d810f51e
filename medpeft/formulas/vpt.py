"""Visual prompt tuning: learned tokens beside those of the image.

Jia et al., "Visual Prompt Tuning" (ECCV 2022), arXiv 2203.12119, Eq. 4 and 5 (shallow), 6 (deep); values as in its Sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.registry import register
from ..adapters.tokens import insert, pad_mask, require_sequence, stand_still, take_off
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.positions import hands_out_blocks, why_not
from ..architecture.site import Partner, Site, Unfit
from ..errors import MedpeftError, require_positive

_HINT = "it adds tokens to transformer blocks in which nothing but attention depends on them. Try 'adaptformer' or 'lora'."
_WHY = "its prompts are tokens, which no weight of the model can add"


class Prompts(nn.Module):
    """The prompts, (n, D), drawn Xavier-uniform over the fan-in of the patch embedding and D, as in the authors' code."""

    def __init__(self, site: Site, tokens: int, dropout: float) -> None:
        super().__init__()
        require_positive("tokens", tokens)
        assert site.layout is not None
        self.name, self.layout = site.name, site.layout
        bound = (6 / (self.layout.patch + self.layout.outputs)) ** 0.5
        self.tokens = nn.Parameter(torch.empty(tokens, self.layout.outputs))
        nn.init.uniform_(self.tokens, -bound, bound, generator=site.generator)
        self.dropout = nn.Dropout(dropout)

    def put_in(self, x: Tensor, method: str) -> Tensor:
        """(B, N, D) → (B, N + n, D): after the class token, if there is one."""
        require_sequence(x, method, self.name)
        return insert(x, self.dropout(self.tokens), self.layout.prefix, self.layout.sequence)

    def take_off(self, x: Tensor) -> Tensor:
        """(B, N + n, D) → (B, N, D): what was put in is gone, and pooling sees none of it."""
        if x.shape[self.layout.sequence] <= self.layout.prefix:
            return x  # CaiT's last blocks give the class token alone.
        return take_off(x, len(self.tokens), self.layout.prefix, self.layout.sequence)


def refuse_mask(x: Tensor, method: str, name: str, value: Any, sequence: int) -> Any:
    """`value`, unless it speaks of each of the tokens of `x`, as a mask does: a `MedpeftError`."""
    if isinstance(value, Tensor) and value.ndim > 1 and value.shape[-1] == x.shape[sequence] != x.shape[-1]:
        raise MedpeftError(
            f"{method!r} adds tokens, but a mask or a bias of shape {tuple(value.shape)} is given with the tokens"
            f"{f' ({name})' if name else ''}: exclude these blocks, or try 'adaptformer' or 'lora'."
        )
    return value


@register(
    "vpt_deep", hint=_HINT, identity=False, search={"tokens": (1, 5, 10, 50, 100), "dropout": (0.0, 0.1)}, unmergeable=_WHY
)
class VPTDeep(Adapter):
    """Learned tokens at the input of every transformer block, taken off at its output: [x, _, E] = L([x, P, E]).

    To take a block's prompts off and put the next one's in is to replace them; the last block's are taken off too, so that
    average pooling, distillation tokens and registers meet what they did before. The model is not the base at first: even
    fresh prompts take part in every softmax.

    Args:
        site: A transformer block.
        tokens: Number of prompts, n.
        dropout: Probability for each of their values.
    """

    def __init__(self, site: Site, *, tokens: int = 10, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.prompts = Prompts(site, tokens, dropout)
        # There True hides a token.
        self.masks_are_torchs = any(isinstance(module, nn.MultiheadAttention) for module in site.layer.modules())

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: int = 10) -> Iterator[Site | Unfit]:
        """Every transformer block in which tokens can be added."""
        return _blocks(network, tokens, given_rotations=True)

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Put the prompts into `x`, and make room for them in rotations, which leave them as they are, and in masks.

        All tokens see the prompts. That keeps a causal mask causal: what leaves a block for the prompts is taken off.
        """
        layout, count = self.prompts.layout, len(self.prompts.tokens)
        for name, value in others.items():
            if name == "rope":
                others[name] = stand_still(value, count)
            else:
                tokens = x.shape[layout.sequence]
                others[name] = pad_mask(value, name, tokens, count, layout.prefix, seen=not self.masks_are_torchs)
        return self.prompts.put_in(x, self.method)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` without the prompts."""
        return self.prompts.take_off(y)


@register(
    "vpt_shallow", hint=_HINT, identity=False, search={"tokens": (1, 5, 10, 50, 100), "dropout": (0.0, 0.1)}, unmergeable=_WHY
)
class VPTShallow(Adapter):
    """Learned tokens at the input of the first transformer block, taken off after the last: [x, Z, E] = L([x, P, E]).

    In a model of several stages, each has its own. Blocks in between give the prompts too, so a model that hands out their
    outputs (MONAI's ViT, for UNETR) is refused, and timm's `forward_intermediates` shows them: vpt_deep hides them. The model
    is not the base at first, as in vpt_deep.

    Args:
        site: The first of the transformer blocks that follow one another.
        tokens: Number of prompts, n.
        dropout: Probability for each of their values.
    """

    def __init__(self, site: Site, *, tokens: int = 10, dropout: float = 0.0) -> None:
        super().__init__(site)
        self.prompts = Prompts(site, tokens, dropout)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: int = 10) -> Iterator[Site | Unfit]:
        """The first block of every row of transformer blocks, with the last as the other module."""
        rows: dict[str, list[Site | Unfit]] = {}
        # Rotations go to every block, and these prompts come in at the first alone.
        for offer in _blocks(network, tokens, given_rotations=False):
            rows.setdefault(offer.name.rpartition(".")[0], []).append(offer)
        for row in rows.values():
            first, last = row[0], row[-1]
            shown = hands_out_blocks(network, first.name)
            unfit = next((offer for offer in row if isinstance(offer, Unfit)), None)
            if unfit is not None:
                yield Unfit(first.name, unfit.reason)
            elif shown:
                yield Unfit(first.name, f"{shown}, from which vpt_deep takes them off")
            else:
                assert isinstance(first, Site)
                assert isinstance(last, Site)
                yield replace(first, partners=(Partner(Site(last.name, last.layer, "", ""), Exit),))

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Put the prompts into `x`."""
        for name, value in others.items():
            refuse_mask(x, self.method, name, value, self.prompts.layout.sequence)
        return self.prompts.put_in(x, self.method)


class Exit(Adapter):
    """Takes the prompts of vpt_shallow off after the last block."""

    def __init__(self, site: Site, first: VPTShallow) -> None:
        super().__init__(site)
        self.shared["first"] = first

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` without the prompts."""
        first: Any = self.shared["first"]
        taken_off: Tensor = first.prompts.take_off(y)
        return taken_off


def _blocks(network: Network, tokens: int, *, given_rotations: bool) -> Iterator[Site | Unfit]:
    """Yield every transformer block as a site, or with the reason why it cannot take more tokens."""
    for block in branches(network):
        reason = why_not(network, block.name, given_rotations=given_rotations)
        if reason:
            yield Unfit(block.name, reason)
        else:
            yield Site(block.name, block.module, "", "", layout=replace(block.stream, adds=tokens))
