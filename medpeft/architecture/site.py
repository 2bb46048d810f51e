"""A place in a model for an adapter: a layer, one of its weights, and its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..errors import MedpeftError
from .attention import Projection
from .layers import any_tensor, kind_of, outputs_first, own_tensor
from .rows import Rows

Shared = TypeVar("Shared", bound=nn.Module)


@dataclass(frozen=True)
class Layout:
    """Channels and tokens of a block or branch.

    Attributes:
        inputs: Channels that enter.
        outputs: Channels that leave.
        axis: Of the channels: -1, or 1 in a convolutional block.
        sequence: Axis of the tokens: 1, or 0 where the batch comes second.
        prefix: Tokens before those of the patches: class, distillation and register tokens.
        grid: Patches along each axis of the image, where the model says so; else empty.
        dims: Axes of the image: 2, or 3 for volumes.
        patch: Values in a patch, the fan-in of the patch embedding; `inputs` where that is not known.
        adds: Tokens that the site's own adapter inserts.
        added: Tokens that other adapters insert before the patches.
    """

    inputs: int
    outputs: int
    axis: int = -1
    sequence: int = 1
    prefix: int = 0
    grid: tuple[int, ...] = ()
    dims: int = 2
    patch: int = 0
    adds: int = 0
    added: int = 0


class Reader(NamedTuple):
    """A module that reads a layer's weight without calling the layer, and the layer's path below it."""

    name: str
    path: str


@dataclass(frozen=True)
class Draft:
    """Facts that an adapter needs while it is built, and not afterwards.

    Attributes:
        method: Name of the method.
        generator: Source of the adapter's initial values.
        shapes_only: Whether only shapes are wanted; `Site.host` is then on the meta device.
        from_file: Whether a file brings the values of its tensors, so that it need not find where to start.
        overwritten: Whether a module of the model works in place, so that the layer's output may be written
            over.
        shared: Modules shared by all adapters of the method on one device, by key; see `Site.share`.
        entered: How what enters the layer spreads on the data given to `apply`, a `Spread`; None where the
            method asks for none.
        activation: The activation of the block around the layer, where the method asks for it.
        together: All sites of the method, of which this one is one.
        around: Name of the module in whose forward the adapters of the method hand values to one another;
            None where they hand on nothing but to their own second places.
        handover: What all adapters of the method hand values over by, from one to the next; a `Handover`.
    """

    method: str = ""
    generator: torch.Generator | None = None
    shapes_only: bool = False
    from_file: bool = False
    overwritten: bool = False
    shared: dict[Any, nn.Module] = field(default_factory=dict)
    entered: Any = None
    activation: nn.Module | None = None
    together: tuple[Site, ...] = ()
    around: str | None = None
    handover: Any = None


@dataclass(frozen=True)
class Site:
    """A place for an adapter.

    Attributes:
        name: Name of the layer in the model, as in `model.named_modules()`.
        layer: The layer.
        weight: Name of the layer's weight; `in_proj_weight` in `nn.MultiheadAttention`, "" for a whole block.
        bias: Name of its bias, "" where it can have none.
        projection: The part that the layer plays in an attention, None elsewhere.
        readers: Modules that read the weight without calling the layer, the outermost first.
        layout: Channels and tokens of a transformer block or of a branch of it, None elsewhere.
        partners: Other places where the same adapter acts.
        draft: Facts that matter only while the adapter is built.

    Examples:
        >>> import medpeft, torch
        >>> site = medpeft.Site("fc", torch.nn.Linear(4, 8))
        >>> site.kind, tuple(site.host.shape)
        ('linear', (8, 4))
    """

    name: str
    layer: nn.Module
    weight: str = "weight"
    bias: str = "bias"
    projection: Projection | None = None
    readers: tuple[Reader, ...] = ()
    layout: Layout | None = None
    partners: tuple[Partner, ...] = ()
    draft: Draft = field(default_factory=Draft, compare=False)

    @property
    def kind(self) -> str:
        """Kind of weight: "linear", "conv", "transposed", "norm" or "embedding"; "block" for a block."""
        if self.weight == "weight":
            return kind_of(self.layer)
        if self.weight == "":
            return "block"
        return "linear"

    @property
    def rows(self) -> tuple[Rows, ...]:
        """Output channels to adapt in a fused projection; empty for all."""
        if self.projection is None:
            return ()
        return self.projection.rows

    @property
    def parts(self) -> str:
        """Letters of what the layer computes in an attention (q, k, v, o), "" elsewhere."""
        if self.projection is None:
            return ""
        return self.projection.parts

    @property
    def only_weight(self) -> bool:
        """Whether only the weight can be adapted: a parent reads it, or the layer has several weights."""
        return bool(self.readers) or self.weight not in ("weight", "")

    def with_parts(self, parts: str) -> Site:
        """Narrow a fused projection to some of its parts; any other site stays as it is."""
        if self.projection is None or not self.projection.rows:
            return self
        kept = tuple(row for row in self.projection.rows if row.part in parts)
        return replace(self, projection=replace(self.projection, rows=kept))

    def tensor(self, name: str) -> Tensor | None:
        """The layer's own weight or bias; None where it has none."""
        return own_tensor(self.layer, name)

    @property
    def has_weight(self) -> bool:
        """Whether the layer has the weight, as a tensor of its own or computed; some norms have none."""
        return any_tensor(self.layer, self.weight) is not None

    @property
    def host(self) -> Tensor:
        """The layer's weight, (out, in, …), detached. It is a `MedpeftError` if there is none."""
        weight = any_tensor(self.layer, self.weight)
        if weight is None:
            raise MedpeftError(f"{self.name} ({type(self.layer).__name__}) has no {self.weight} to adapt.")
        weight = outputs_first(self.layer, weight.detach())
        if self.draft.shapes_only:
            return weight.to("meta")
        return weight

    @property
    def output_channels(self) -> int:
        """Channels of the layer's output, by its weight."""
        if self.kind == "transposed":
            return self.host.shape[1] * getattr(self.layer, "groups", 1)
        return self.host.shape[0]

    @property
    def generator(self) -> torch.Generator | None:
        """Source of the adapter's initial values."""
        return self.draft.generator

    def share(self, key: Any, make: Callable[[], Shared]) -> Shared:
        """Get the module that the method's adapters share by this key; the first to ask makes it.

        Keep it in `Adapter.shared`: it is registered once, on the model, and so moved, copied, counted and
        saved once.
        """
        if key not in self.draft.shared:
            self.draft.shared[key] = make()
        return self.draft.shared[key]  # type: ignore[return-value]  # a key names modules of one type

    @property
    def suffix(self) -> str:
        """Suffix of the adapter's name; tells two adapted weights of one layer apart."""
        if self.weight in ("weight", ""):
            return ""
        return f"_{self.weight}"


@dataclass(frozen=True)
class Partner:
    """A second place where an adapter acts, through another adapter without parameters.

    Attributes:
        site: The second place.
        make: Makes the adapter from its site and the first adapter.
    """

    site: Site
    make: Callable[[Site, Any], nn.Module]


@dataclass(frozen=True)
class Unfit:
    """A layer of the right kind where a method would be wrong, with the reason."""

    name: str
    reason: str
