"""Prefix tuning: learned keys and values in every attention.

Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (ACL 2021), arXiv 2101.00190, Sec. 4.2; in the form of
He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (ICLR 2022), arXiv 2110.04366, Eq. 4. Without the
MLP through which the first draws the prefix in training: the prefixes themselves are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.registry import register
from ..adapters.tokens import insert, pad_mask, require_sequence, stand_still, take_off
from ..architecture.attention import Projection, projections
from ..architecture.blocks import attention_layout
from ..architecture.network import Network
from ..architecture.positions import why_not
from ..architecture.site import Partner, Site, Unfit
from ..errors import MedpeftError, require_positive

_HINT = "it adds keys and values to attentions over tokens without positions of their own. Try 'lora' or 'adaptformer'."


@register(
    "prefix",
    hint=_HINT,
    identity=False,
    search={"tokens": (1, 5, 10, 20, 50)},
    unmergeable="its keys and values belong to no token, and no weight of the attention computes them",
)
class Prefix(Adapter):
    """Learned keys and values in every attention: softmax(q·[P_k; k]ᵀ / √d)·[P_v; v].

    Tokens of zeros enter the attention; what its projections make of them is replaced by the prefix, and what leaves for them
    is taken off. So the attention computes in its own way, fused or not, and normalises, masks and drops the new keys as the
    others. `nn.MultiheadAttention` has a place for such keys. The model is not the base at first: even a fresh prefix takes
    part in every softmax.

    Args:
        site: An attention.
        tokens: Number of keys and values.
    """

    def __init__(self, site: Site, *, tokens: int = 10) -> None:
        super().__init__(site)
        require_positive("tokens", tokens)
        assert site.layout is not None
        self.name, self.layout = site.name, site.layout
        self.in_slots = site.weight == "bias_k"
        self.acts_on = frozenset({"input", "weight"}) if self.in_slots else frozenset({"input", "output"})
        # By name of a projection: (part, first channel, channels, groups, channels of a group with the other parts).
        self.places: dict[str, list[tuple[str, int, int, int, int]]] = {}
        sizes = dict.fromkeys("kv", site.layout.inputs) if self.in_slots else self._find_places(site)
        self.k = nn.Parameter(torch.empty(tokens, sizes["k"]))
        self.v = nn.Parameter(torch.empty(tokens, sizes["v"]))
        for prefix in (self.k, self.v):
            nn.init.normal_(prefix, std=0.02, generator=site.generator)

    def _find_places(self, site: Site) -> dict[str, int]:
        """Where the projections put keys and values; returns how many channels each has."""
        sizes: dict[str, int] = {}
        for projection in projections(site.layer):
            channels = _channels(site.layer, projection)
            found = [(r.part, r.start, r.size, r.groups, channels // r.groups) for r in projection.rows]
            found = found or [(projection.part, 0, channels, 1, channels)]
            sizes |= {part: size * groups for part, _, size, groups, _ in found}
            self.places[f"{site.name}.{projection.path}".strip(".")] = [place for place in found if place[0] in "kv"]
        return sizes

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: int = 10) -> Iterator[Site | Unfit]:
        """Every attention of tokens with one another."""
        for name, parts in network.attentions.items():
            module, layout = network.modules[name], attention_layout(network, name)
            if layout is None or network.inside(name, network.head):
                continue
            if isinstance(module, nn.MultiheadAttention):
                if module.bias_k is not None:
                    yield Unfit(name, "has a key and a value of its own (add_bias_kv)")
                else:
                    yield Site(name, module, "bias_k", "bias_v", layout=layout)
                continue
            reason = _why_not(network, name, parts) or why_not(network, name)
            if reason:
                yield Unfit(name, reason)
                continue
            partners = []
            for projection in parts:
                if set(projection.parts) & {"k", "v"}:
                    path = f"{name}.{projection.path}".strip(".")
                    partners.append(Partner(Site(path, network.modules[path], "", ""), Keys))
            yield Site(name, module, "", "", layout=replace(layout, adds=tokens), partners=tuple(partners))

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """(B, N, D) → (B, N + n, D) with zeros for the prefix, for which rotations and masks make room."""
        if self.in_slots:
            for name, value in others.items():
                others[name] = self._beside_slots(name, value)
            return x
        for name, value in others.items():
            others[name] = stand_still(value, len(self.k)) if name == "rope" else self._padded(x, name, value)
        require_sequence(x, self.method, self.name)
        return insert(x, x.new_zeros(len(self.k), x.shape[-1]), self.layout.prefix, self.layout.sequence)

    def _padded(self, x: Tensor, name: str, value: Any) -> Any:
        """Make room for the prefix, which every token sees, in a mask."""
        padded = pad_mask(value, name, x.shape[self.layout.sequence], len(self.k), self.layout.prefix)
        if padded is value and isinstance(value, Tensor) and value.ndim == 3 and value.shape[::2] == x.shape[::2]:
            raise MedpeftError(
                f"{self.method!r} adds keys for the tokens of {self.name}, which is given others, {tuple(value.shape)}"
                f"{f' ({name})' if name else ''}, to attend to: exclude it."
            )
        return padded

    def _beside_slots(self, name: str, value: Any) -> Any:
        """Make room for the prefix in what else an `nn.MultiheadAttention` is given."""
        if name == "key_padding_mask" and isinstance(value, Tensor):
            return F.pad(value, (0, len(self.k) - 1))  # The attention itself adds one column.
        if name == "attn_mask" and isinstance(value, Tensor) and len(self.k) > 1:
            raise MedpeftError(
                f"{self.method!r} adds {len(self.k)} keys, and torch's attention ({self.name}), given an attn_mask, leaves "
                "room for one: pass tokens=1, or exclude it."
            )
        if name == "is_causal":
            return False  # With it torch could leave out the mask, and with that the columns of the prefix.
        return value

    def put_in(self, projection: str, y: Tensor) -> Tensor:
        """Put the prefix in the place of what a projection made of the zeros."""
        rows = []
        for part, start, size, groups, total in self.places[projection]:
            prefix = (self.k if part == "k" else self.v).unflatten(1, (groups, size))
            rows.append(F.pad(prefix, (start, total - start - size)).flatten(1))
        at, axis = self.layout.prefix, self.layout.sequence
        return insert(take_off(y, len(self.k), at, axis), torch.stack(rows).sum(0), at, axis)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, N + n, D) → (B, N, D); a class attention gives the class token alone."""
        axis = self.layout.sequence
        whole = y.ndim == x.ndim and y.shape[axis] == x.shape[axis]
        return take_off(y, len(self.k), self.layout.prefix, axis) if whole else y

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values for the slots of an `nn.MultiheadAttention`, (n, 1, D)."""
        return self.k[:, None], self.v[:, None]


class Keys(Adapter):
    """Puts the prefix into the output of a projection of keys, of values, or of both."""

    def __init__(self, site: Site, first: Prefix) -> None:
        super().__init__(site)
        self.name = site.name
        self.shared["first"] = first

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the prefix."""
        first: Any = self.shared["first"]
        with_prefix: Tensor = first.put_in(self.name, y)
        return with_prefix


def _channels(attention: nn.Module, projection: Projection) -> int:
    weight: Tensor = attention.get_submodule(projection.path)._parameters[projection.weight]  # type: ignore[assignment]
    return len(weight)


def _why_not(network: Network, name: str, parts: list[Projection]) -> str:
    """Why the projections of an attention leave no place for a prefix; "" where they do."""
    module = network.modules[name]
    widths = {tuple(module.get_submodule(p.path).weight.shape[1:]) for p in parts if set(p.parts) & {"q", "k"}}
    if len(widths) > 1 or getattr(module, "is_cross_attention", False) or sum("k" in p.parts for p in parts) > 1:
        return "attends to tokens other than its own"
    for projection in parts:
        full = f"{name}.{projection.path}".strip(".")
        if set(projection.parts) & {"k", "v"} and network.readers(network.modules[full], projection.weight, projection.bias):
            return f"reads the weight of {full} without calling it"
    return ""
