"""Prefix tuning: learned keys and values in every attention.

Li & Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (ACL 2021),
arXiv 2101.00190, Sec. 4.2; in the form of He et al., "Towards a Unified View of Parameter-Efficient Transfer
Learning" (ICLR 2022), arXiv 2110.04366, Eq. 4. The prefixes themselves are trained, without the MLP through
which the first paper draws them in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, SecondPlace
from ..adapters.options import Count
from ..adapters.registry import register
from ..adapters.tokens import TokenSpan, in_brackets, require_sequence
from ..architecture.attention import Projection, projections
from ..architecture.blocks import attention_layout
from ..architecture.layers import any_tensor
from ..architecture.network import Network
from ..architecture.positions import why_not
from ..architecture.rows import Rows
from ..architecture.site import Layout, Partner, Site, Unfit
from ..errors import MedpeftError

_INSTEAD = "Try 'lora' or 'adaptformer'."
_HINT = f"it adds keys and values to attentions over tokens without positions of their own. {_INSTEAD}"


@dataclass(frozen=True)
class Place:
    """Channels of a projection that hold keys or values.

    Attributes:
        rows: The channels, whose part is "k" or "v".
        channels: Channels of the whole projection.
    """

    rows: Rows
    channels: int

    def scatter(self, prefix: Tensor) -> Tensor:
        """Put a prefix into the projection's channels, with zeros elsewhere: (n, width) → (n, channels)."""
        rows = self.rows
        after = self.channels // rows.groups - rows.start - rows.size
        by_group = prefix.unflatten(1, (rows.groups, rows.size))  # (n, width) → (n, G, size)
        return F.pad(by_group, (rows.start, after)).flatten(1)  # (n, G, channels / G) → (n, channels)


@register(
    "prefix",
    hint=_HINT,
    identity=False,
    search={"tokens": (1, 5, 10, 20, 50)},
    unmergeable="its keys and values belong to no token, and no weight of the attention computes them",
    unscalable="its keys and values take part in every softmax, or do not",
)
class Prefix(Adapter):
    """Learned keys and values in every attention: softmax(q·[P_k; k]ᵀ / √d)·[P_v; v].

    Tokens of zeros enter the attention. The prefix replaces their keys and values, and their outputs are
    taken off. So the attention computes in its own way, fused or not, and treats the new keys like all
    others: it normalises, masks and drops them. `nn.MultiheadAttention` has slots for such keys, its
    `bias_k` and `bias_v`. The model is not the base at first: even a fresh prefix takes part in every
    softmax.

    Args:
        site: An attention. Its partners are the projections that make keys or values.
        tokens: Number of keys and values, n.
    """

    def __init__(self, site: Site, *, tokens: Count = 10) -> None:
        super().__init__(site)
        assert site.layout is not None
        self.name, self.layout = site.name, site.layout
        self.span = TokenSpan(tokens, start=self.layout.prefix, axis=self.layout.sequence)
        self.in_slots = site.weight == "bias_k"
        self.places: dict[str, list[Place]] = {}
        if self.in_slots:
            self.acts_on = frozenset({"input", "weight"})
            widths = {"k": self.layout.inputs, "v": self.layout.inputs}
        else:
            self.places = _places(site)
            widths = _widths(self.places)
        self.k = nn.Parameter(torch.empty(tokens, widths["k"]))
        self.v = nn.Parameter(torch.empty(tokens, widths["v"]))
        for prefix in (self.k, self.v):
            nn.init.normal_(prefix, std=0.02, generator=site.generator)

    @classmethod
    def sites(cls, network: Network, *, targeted: bool = False, tokens: Count = 10) -> Iterator[Site | Unfit]:
        """Yield every attention of tokens with one another."""
        for name, parts in network.attentions.items():
            layout = attention_layout(network, name)
            if layout is None or network.in_head(name):
                continue
            if isinstance(network.modules[name], nn.MultiheadAttention):
                yield _site_in_slots(network, name, layout)
            else:
                yield _site_in_projections(network, name, parts, replace(layout, adds=tokens))

    def enter(self, x: Tensor, others: dict[str, Any]) -> Tensor:
        """Put zeros into `x` for the prefix, and make room for it in rotations and masks.

        (B, N, D) → (B, N + n, D). An attention with slots needs no zeros.
        """
        for name, value in others.items():
            if self.in_slots:
                others[name] = self._beside_slots(name, value)
            else:
                others[name] = self._widened(x, name, value)
        if self.in_slots:
            return x
        require_sequence(x, self.method, self.name)
        zeros = x.new_zeros(self.span.count, x.shape[-1])
        return self.span.insert(x, self.span.for_every_sample(zeros, x))

    def _widened(self, x: Tensor, name: str, value: Any) -> Any:
        """Make room for the prefix in rotations or a mask, and refuse other tokens to attend to."""
        widened = self.span.widened(value, name, x.shape[self.span.axis])
        if widened is value and _is_sequence_like(x, value):
            raise MedpeftError(
                f"{self.method!r} adds keys for the tokens of {self.name}, which is given others, "
                f"{tuple(value.shape)}{in_brackets(name)}, to attend to: exclude it."
            )
        return widened

    def _beside_slots(self, name: str, value: Any) -> Any:
        """Make room for the prefix in a further input of an `nn.MultiheadAttention`."""
        count = self.span.count
        if name == "key_padding_mask" and isinstance(value, Tensor):
            # (B, N) → (B, N + n − 1): the attention itself adds one column.
            return F.pad(value, (0, count - 1))
        if name == "attn_mask" and isinstance(value, Tensor) and count > 1:
            raise MedpeftError(
                f"{self.method!r} adds {count} keys, and torch's attention ({self.name}), given an "
                "attn_mask, leaves room for one: pass tokens=1, or exclude it."
            )
        if name == "is_causal":
            return False  # With True, torch could leave out the mask, and with it the columns of the prefix.
        return value

    def put_in(self, projection: str, y: Tensor) -> Tensor:
        """Replace a projection's output for the zeros by the prefix: (B, N + n, D) → (B, N + n, D)."""
        rows = []
        for place in self.places[projection]:
            prefix = self.k if place.rows.part == "k" else self.v
            rows.append(place.scatter(prefix))
        rest = self.span.take_off(y)
        return self.span.insert(rest, self.span.for_every_sample(torch.stack(rows).sum(0), rest))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Take the prefix off, (B, N + n, D) → (B, N, D); a class attention gives the class token alone."""
        axis = self.span.axis
        if y.ndim != x.ndim or y.shape[axis] != x.shape[axis]:
            return y
        return self.span.take_off(y)

    def merged(self, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Give keys and values for the slots of an `nn.MultiheadAttention`: (n, D) → (n, 1, D)."""
        return self.k[:, None], self.v[:, None]


def _is_sequence_like(x: Tensor, value: Any) -> bool:
    """Whether an input is another sequence of as many samples and channels, (B, M, D)."""
    return isinstance(value, Tensor) and value.ndim == 3 and value.shape[::2] == x.shape[::2]


class Keys(SecondPlace):
    """Second place of a prefix: a projection of keys, values or both, whose output receives the prefix."""

    first: Prefix

    def __init__(self, site: Site, first: Prefix) -> None:
        super().__init__(site, first)
        self.name = site.name

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return `y` with the prefix in place of the outputs for the zeros."""
        return self.first.put_in(self.name, y)


def _places(site: Site) -> dict[str, list[Place]]:
    """Find the channels that hold keys or values, by the name of their projection."""
    places: dict[str, list[Place]] = {}
    for projection in projections(site.layer):
        channels = len(_weight_of(site.layer, projection))
        for rows in projection.rows or (Rows(projection.part, 0, channels),):
            if rows.part in ("k", "v"):
                places.setdefault(projection.layer_in(site.name), []).append(Place(rows, channels))
    return places


def _weight_of(attention: nn.Module, projection: Projection) -> Tensor:
    weight = any_tensor(attention.get_submodule(projection.path), projection.weight)
    assert weight is not None  # By it the projection was found.
    return weight


def _widths(places: dict[str, list[Place]]) -> dict[str, int]:
    """Channels of a key and of a value."""
    widths = {}
    for of_projection in places.values():
        for place in of_projection:
            widths[place.rows.part] = place.rows.count
    return widths


def _makes_keys_or_values(projection: Projection) -> bool:
    return bool(set(projection.parts) & {"k", "v"})


def _site_in_slots(network: Network, name: str, layout: Layout) -> Site | Unfit:
    """Make a site of torch's own attention, which has slots for keys and values that belong to no token."""
    attention: Any = network.modules[name]
    if attention.bias_k is not None:
        return Unfit(name, "has a key and a value of its own (add_bias_kv)")
    return Site(name, attention, "bias_k", "bias_v", layout=layout)


def _site_in_projections(
    network: Network,
    name: str,
    parts: list[Projection],
    layout: Layout,
) -> Site | Unfit:
    """Make a site of an attention that calls its projections, with those of keys and values as partners."""
    reason = _without_place(network, name, parts) or why_not(network, name)
    if reason:
        return Unfit(name, reason)
    partners = []
    for projection in filter(_makes_keys_or_values, parts):
        path = projection.layer_in(name)
        partners.append(Partner(Site(path, network.modules[path], "", ""), Keys))
    return Site(name, network.modules[name], "", "", layout=layout, partners=tuple(partners))


def _without_place(network: Network, name: str, parts: list[Projection]) -> str:
    """Reason why the projections of an attention leave no place for a prefix; "" if they leave one."""
    attention = network.modules[name]
    makers_of_keys = 0
    widths = set()
    for projection in parts:
        if "k" in projection.parts:
            makers_of_keys += 1
        if set(projection.parts) & {"q", "k"}:
            widths.add(tuple(_weight_of(attention, projection).shape[1:]))
    if len(widths) > 1 or getattr(attention, "is_cross_attention", False) or makers_of_keys > 1:
        return "attends to tokens other than its own"
    for projection in filter(_makes_keys_or_values, parts):
        path = projection.layer_in(name)
        if network.readers(network.modules[path], projection.weight, projection.bias):
            return f"reads the weight of {path} without calling it"
    return ""
