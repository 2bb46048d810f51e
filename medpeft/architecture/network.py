"""Which layers of a model a method is offered, and which of them a target or an exclusion picks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from torch import nn

from .attention import Projection, is_attention_shell, projections
from .layers import erases_scale, is_conv, is_mlp, is_norm, is_transposed, norm_channels, own_tensor
from .site import Site
from .weight_reads import overwrites, reads

ROLES = ("attention", "mlp", "linear", "conv", "norm", "embedding")


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters, as a selective method sees it: its name, itself, and what it belongs to.

    Attributes:
        name: As in `model.named_modules()`.
        module: The module.
        attention: Name of the attention layer it belongs to, "" for none.
        attention_block: Name of the block around that attention, "" for none.
    """

    name: str
    module: nn.Module
    attention: str = ""
    attention_block: str = ""


class Network:
    """A model with what the methods ask about it, each found once."""

    def __init__(self, model: nn.Module, head: Sequence[str] = ()) -> None:
        self.model = model
        self.head = tuple(head)
        self.modules = dict(model.named_modules())

    def inside(self, name: str, ancestors: Sequence[str]) -> bool:
        """Whether a module is one of `ancestors` or lies in one."""
        return any(name == a or name.startswith(a + ".") for a in ancestors)

    @cached_property
    def attentions(self) -> dict[str, list[Projection]]:
        """Every module that owns the projections of an attention, with them."""
        found = ((name, projections(module)) for name, module in self.modules.items())
        return {name: parts for name, parts in found if parts}

    @cached_property
    def attention_layers(self) -> dict[str, str]:
        """Whole attention layers: name of the layer for each module of `attentions`, shells included."""
        return {core: self._shell(core) for core in self.attentions}

    def _shell(self, name: str) -> str:
        parent = name.rpartition(".")[0]
        while name and parent and is_attention_shell(self.modules[parent]):
            name, parent = parent, parent.rpartition(".")[0]
        return name

    @cached_property
    def attention_blocks(self) -> dict[str, str]:
        """The block around each attention layer: diffusers' element of `attentions`, else the attention's parent."""
        return {core: self._block(layer) for core, layer in self.attention_layers.items()}

    def _block(self, layer: str) -> str:
        element = re.search(r"^(.*\battentions\.\d+)(\.|$)", layer)
        return element.group(1) if element else layer.rpartition(".")[0]

    @cached_property
    def _projections(self) -> dict[tuple[str, str], Projection]:
        return {(f"{core}.{p.path}".strip("."), p.weight): p for core, parts in self.attentions.items() for p in parts}

    @cached_property
    def _readers(self) -> dict[tuple[str, str], str]:
        """Outermost module that reads a tensor without calling its layer, by layer and name of the tensor."""
        found: dict[tuple[str, str], str] = {}
        for name, module in self.modules.items():
            for path in reads(type(module)):  # type: ignore[arg-type]  # mypy does not see that a class is hashable
                for layer, tensor in _resolve(name, module, path):
                    found.setdefault((layer, tensor), name)
        return found

    @cached_property
    def _works_in_place(self) -> bool:
        return any(_works_in_place(module) for module in self.modules.values())

    def reader(self, layer: str, *tensors: str) -> str | None:
        """Outermost module that reads one of the layer's tensors without calling the layer."""
        found = [self._readers[layer, t] for t in tensors if (layer, t) in self._readers]
        return min(found, key=len, default=None)

    def sites(self, *kinds: str) -> Iterator[Site]:
        """Every place outside the head with a weight of one of these kinds, in the order of the model."""
        for name, module in self.modules.items():
            if self.inside(name, self.head):
                continue
            for site in self._sites_of(name, module):
                if not kinds or site.kind in kinds:
                    yield site

    def _sites_of(self, name: str, module: nn.Module) -> Iterator[Site]:
        kind = _kind(module)
        if kind:
            yield self._site(name, module, kind, "weight", "bias")
        for projection in self.attentions.get(name, ()):
            if projection.path == "" and projection.weight != "weight":
                yield self._site(name, module, "linear", projection.weight, projection.bias)

    def _site(self, name: str, module: nn.Module, kind: str, weight: str, bias: str) -> Site:
        found = self._projections.get((name, weight))
        reader, overwritten = self.reader(name, weight, bias), self._works_in_place
        site = Site(name, module, kind, weight, bias, reader=reader, overwritten=overwritten)
        if site.reader is not None and site.tensor(bias) is None and (name, bias) not in self._readers:
            site = replace(site, bias="")  # The reader brings a bias of its own, as BEiT's q_bias and v_bias.
        if weight != "weight" and site.reader is None:
            site = replace(site, reader=name)
        return site if found is None else replace(site, rows=found.rows, parts=found.parts)

    def blocks(self) -> Iterator[tuple[str, nn.Module, str, str]]:
        """Transformer blocks with an attention and an MLP: name, block, names of the MLP and of the norm before it."""
        layers = set(self.attention_layers.values())
        for name, module in self.modules.items():
            children = {child: f"{name}.{child}".strip(".") for child in module._modules}
            attends = [child for child, full in children.items() if full in layers]
            mlps = [c for c, full in children.items() if self._is_whole_mlp(full)]
            mlp = mlps[0] if len(mlps) == 1 else ""  # Of several, as in TNT, each has a residual stream of its own.
            norm = _norm_before_mlp(list(children), len(attends))
            if attends and mlp and norm and not self.inside(name, self.head) and name:
                yield name, module, mlp, norm

    def _is_whole_mlp(self, name: str) -> bool:
        module = self.modules.get(name)
        return module is not None and not _kind(module) and is_mlp(name, module)

    def erased(self, site: Site) -> bool:
        """Whether a batch or instance norm right after the site's layer undoes a scale and shift of its output."""
        norm = self._after.get(site.name)
        host = site.host
        channels = host.shape[1] * getattr(site.layer, "groups", 1) if site.kind == "transposed" else host.shape[0]
        return norm is not None and erases_scale(norm) and norm_channels(norm) == channels

    @cached_property
    def _after(self) -> dict[str, nn.Module]:
        """The layer with a weight that follows each, inside the same parent, by the order in which they were registered."""
        names = [name for name, module in self.modules.items() if _kind(module)]
        around = Counter(a for name in names for a in _ancestors(name))
        found = {}
        for name, after in pairwise(names):
            # A module around this layer alone, as MONAI's Convolution, stands for it.
            unit = next((a for a in _ancestors(name) if around[a] == 1), name)
            parent, _, own = unit.rpartition(".")
            # Where all convolutions are registered before all norms, as in MONAI's UnetResBlock, numbers pair them.
            numbered = f"{parent}.{re.sub('^conv', 'norm', own)}".lstrip(".")
            follows = after.startswith(f"{parent}.".lstrip(".")) and _kind(self.modules[after]) == "norm"
            if re.fullmatch(r"conv\d+", own) and numbered in self.modules and not follows:
                after = numbered
            if not parent or after.startswith(parent + "."):
                found[name] = self.modules[after]
        return found

    def layer(self, name: str) -> Layer:
        """The module as a selective method sees it."""
        return Layer(name, self.modules[name], *self._attention_of.get(name, ("", "")))

    @cached_property
    def _attention_of(self) -> dict[str, tuple[str, str]]:
        layers, blocks = set(self.attention_layers.values()), set(self.attention_blocks.values())
        return {name: (self._around(name, layers), self._around(name, blocks)) for name in self.modules}

    def _around(self, name: str, places: set[str]) -> str:
        while name and name not in places:
            name = name.rpartition(".")[0]
        return name

    def has_role(self, name: str, role: str) -> bool:
        """Whether the layer has one of `ROLES`, itself or by what it belongs to."""
        if role == "attention":
            return bool(self.layer(name).attention)
        if role == "mlp":
            steps = name.split(".")
            around = (".".join(steps[: i + 1]) for i in range(len(steps)))
            return any(is_mlp(full, self.modules[full]) for full in around if full in self.modules)
        kind = _kind(self.modules[name])
        return role == ("conv" if kind == "transposed" else kind)


def _works_in_place(module: nn.Module) -> bool:
    """Whether a module may change its input in place, as it says itself or by what its `forward` does."""
    said = getattr(module, "inplace", not _kind(module) and overwrites(type(module)))  # type: ignore[arg-type]  # as above
    return said is True


def _ancestors(name: str) -> list[str]:
    """Names of the modules around a layer, the outermost first, the model itself left out."""
    steps = name.split(".")
    return [".".join(steps[:i]) for i in range(1, len(steps))]


def _kind(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return "linear"
    if is_conv(module):
        return "transposed" if is_transposed(module) else "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "norm" if is_norm(module) else ""


def _resolve(name: str, module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    """The layers and tensors below `module` that a path with `*` for any index names."""
    *steps, tensor = path.split(".")
    found = [(name, module)]
    for step in steps:
        found = [
            (f"{n}.{child}".strip("."), below)
            for n, m in found
            for child, below in m._modules.items()
            if step in ("*", child) and below is not None
        ]
    return ((n, tensor) for n, m in found if own_tensor(m, tensor) is not None or tensor in m._parameters)


def _norm_before_mlp(children: list[str], attentions: int) -> str:
    """By name, the norm whose input is the residual stream after the (last) attention."""
    third = ("norm3",) if attentions > 1 else ()
    names = (*third, "norm2", "ln_2", "layernorm_after", "layer_norm2", "final_layer_norm", "ffn_norm", "norm_mlp")
    return next((name for name in names if name in children), "")
