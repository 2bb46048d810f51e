"""Visual prompt tuning: learned tokens beside those of the image.

Jia et al., "Visual Prompt Tuning" (ECCV 2022), arXiv 2203.12119, Eq. 4 and 5 (shallow), 6 (deep); values as
in its Sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace
from ..adapters.options import Count, Probability
from ..adapters.registry import register
from ..adapters.tokens import TokenSpan, in_brackets, require_sequence
from ..architecture.blocks import branches
from ..architecture.network import Network
from ..architecture.positions import hands_out_blocks, why_not
from ..architecture.site import Partner, Site, Unfit
from ..errors import MedpeftError

_INSTEAD = "Try 'adaptformer' or 'lora'."
_HINT = f"it adds tokens to transformer blocks in which nothing but attention depends on them. {_INSTEAD}"
_UNMERGEABLE = "its prompts are tokens, which no weight of the model can add"
_UNSCALABLE = "its prompts are tokens, of which there is no part"
_SEARCH = {"tokens": (1, 5, 10, 50, 100), "dropout": (0.0, 0.1)}


class Prompts(nn.Module):
    """Learned tokens, (n, D), that stand after the class token, if there is one, and before the patches.

    They are drawn Xavier-uniform over the fan-in of the patch embedding and D, as in the authors' code.
    """

    def __init__(self, site: Site, tokens: int, dropout: float) -> None:
        super().__init__()
        assert site.layout is not None
        self.name, self.layout = site.name, site.layout
        self.span = TokenSpan(tokens, start=self.layout.prefix, axis=self.layout.sequence)
        bound = (6 / (self.layout.patch + self.layout.outputs)) ** 0.5
        self.tokens = nn.Parameter(torch.empty(tokens, self.layout.outputs))
        nn.init.uniform_(self.tokens, -bound, bound, generator=site.generator)
        self.dropout = nn.Dropout(dropout)

    def put_in(self, x: Tensor, method: str) -> Tensor:
        """Insert the prompts: (B, N, D) → (B, N + n, D)."""
        require_sequence(x, method, self.name)
        # As in the authors' code, dropout draws anew for every sample.
        return self.span.insert(x, self.dropout(self.span.for_every_sample(self.tokens, x)))

    def take_off(self, x: Tensor) -> Tensor:
        """Drop the prompts, so that pooling sees none of them: (B, N + n, D) → (B, N, D)."""
        if x.shape[self.layout.sequence] <= self.layout.prefix:
            return x  # CaiT's last blocks give the class token alone.
        return self.span.take_off(x)


@register(
    "vpt_deep",
    hint=_HINT,
    identity=False,
    search=_SEARCH,
    unmergeable=_UNMERGEABLE,
    unscalable=_UNSCALABLE,
)
class VPTDeep(Adapter):
    """Learned tokens at every transformer block's input, taken off at its output: [x, _, E] = L([x, P, E]).

    To take a block's prompts off and put the next one's in is to replace them. The last block's are taken
    off too, so that average pooling, distillation tokens and registers meet what they did before. The model
    is not the base at first: even fresh prompts take part in every softmax.

    Args:
        site: A transformer block.
        tokens: Number of prompts, n.
        dropout: Probability for each of their values, drawn for every sample.
    """

    def __init__(self, site: Site, *, tokens: Count = 10, dropout: Probability = 0.0) -> None:
        super().__init__(site)
        self.prompts = Prompts(site, tokens, dropout)
        # In the masks of torch's attention, True hides a token.
        self.seen = not any(isinstance(module, nn.MultiheadAttention) for module in site.layer.modules())

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: Count = 10) -> Iterator[Site | Unfit]:
        """Yield every transformer block in which tokens can be added."""
        return _blocks(network, tokens, given_rotations=True)

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Put the prompts into `x`, and make room for them in rotations and masks.

        Rotations leave the prompts as they are, and all tokens see them. A causal mask stays
        causal, because the outputs for the prompts are taken off.
        """
        span = self.prompts.span
        for name, value in others.items():
            others[name] = span.widened(value, name, x.shape[span.axis], seen=self.seen)
        return self.prompts.put_in(x, self.method)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` without the prompts."""
        return self.prompts.take_off(y)


@register(
    "vpt_shallow",
    hint=_HINT,
    identity=False,
    search=_SEARCH,
    unmergeable=_UNMERGEABLE,
    unscalable=_UNSCALABLE,
)
class VPTShallow(Adapter):
    """Learned tokens at the first transformer block, taken off after the last: [x, Z, E] = L([x, P, E]).

    In a model of several stages, each has its own. Between the first and the last block the prompts are
    part of the sequence. Models that hand out the outputs of those blocks (MONAI's ViT in UNETR) are
    therefore refused, and timm's `forward_intermediates` shows the prompts; `vpt_deep` removes them after
    every block. The model is not the base at first, as with `vpt_deep`.

    Args:
        site: The first of the transformer blocks that follow one another. Its partner is the last.
        tokens: Number of prompts, n.
        dropout: Probability for each of their values, drawn for every sample.
    """

    def __init__(self, site: Site, *, tokens: Count = 10, dropout: Probability = 0.0) -> None:
        super().__init__(site)
        self.prompts = Prompts(site, tokens, dropout)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: Count = 10) -> Iterator[Site | Unfit]:
        """Yield the first block of every row of transformer blocks, with the last as its partner."""
        # Rotations are given to every block, and only the first makes room for these prompts.
        for row in _rows(_blocks(network, tokens, given_rotations=False)):
            yield _first_to_last(network, row)

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Put the prompts into `x`."""
        for name, value in others.items():
            _refuse_mask(x, value, name, self.method, self.prompts.span)
        return self.prompts.put_in(x, self.method)


class Exit(SecondPlace):
    """Second place of vpt_shallow: the last block, after which the prompts are taken off."""

    first: VPTShallow

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` without the prompts."""
        return self.first.prompts.take_off(y)


def _blocks(network: Network, tokens: int, *, given_rotations: bool) -> Iterator[Site | Unfit]:
    """Yield every transformer block as a site, or with the reason why it cannot take more tokens."""
    for block in branches(network):
        reason = why_not(network, block.name, given_rotations=given_rotations)
        if reason:
            yield Unfit(block.name, reason)
        else:
            layout = replace(block.stream, adds=tokens)
            yield Site(block.name, block.module, "", "", layout=layout)


def _rows(blocks: Iterable[Site | Unfit]) -> list[list[Site | Unfit]]:
    """Group blocks by the module that holds them: those of a group follow one another."""
    rows: dict[str, list[Site | Unfit]] = {}
    for block in blocks:
        holder = block.name.rpartition(".")[0]
        rows.setdefault(holder, []).append(block)
    return list(rows.values())


def _first_to_last(network: Network, row: list[Site | Unfit]) -> Site | Unfit:
    """Make one site of a row of blocks, or give the reason why prompts cannot pass through all of them."""
    first, last = row[0], row[-1]
    for block in row:
        if isinstance(block, Unfit):
            return Unfit(first.name, block.reason)
    reason = hands_out_blocks(network, first.name)
    if reason:
        return Unfit(first.name, f"{reason}, from which vpt_deep takes them off")
    assert isinstance(first, Site)
    assert isinstance(last, Site)
    return replace(first, partners=(Partner(Site(last.name, last.layer, "", ""), Exit),))


def _refuse_mask(x: Tensor, value: Any, name: str, method: str, span: TokenSpan) -> None:
    """Raise `MedpeftError` if an input says something of every token of `x`, as a mask does."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return
    if value.shape[-1] == x.shape[span.axis] != x.shape[-1]:
        raise MedpeftError(
            f"{method!r} adds tokens, but a mask or a bias of shape {tuple(value.shape)} is given with the "
            f"tokens{in_brackets(name)}: exclude these blocks, or try 'adaptformer' or 'lora'."
        )
