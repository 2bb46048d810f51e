"""Answers about a model: its attentions, its transformer blocks, and places for adapters."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn

from .attention import Projection, is_attention_shell, projections
from .depth import last_modules, outermost_blocks
from .layers import erases_scale, is_conv, is_mlp, kind_of, norm_channels, own_tensor, parents, within
from .site import Draft, Reader, Site
from .weight_reads import overwrites, reads, resolved

# Names of the norm before a block's MLP, in the libraries' blocks.
_NORM_BEFORE_MLP = (
    *("norm2", "ln_2", "layernorm_after", "layer_norm2"),
    *("final_layer_norm", "ffn_norm", "norm_mlp"),
)


@dataclass(frozen=True)
class Layer:
    """A module that owns parameters, as a selective method sees it.

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


@dataclass(frozen=True)
class TransformerBlock:
    """A block with an attention and an MLP.

    Attributes:
        name: Name of the block in the model.
        module: The block.
        attentions: Names of its attentions, below the block.
        mlp: Name of its MLP, below the block.
        norm: Name of the norm before the MLP, below the block.
    """

    name: str
    module: nn.Module
    attentions: tuple[str, ...]
    mlp: str
    norm: str


class Network:
    """A model, with answers to the questions of methods about it.

    What takes a walk over the model is found once, but for sites, blocks and readers.

    Attributes:
        model: The model.
        head: Names of the modules that make up its head.
        depth: Share of its blocks in which places for adapters are wanted, the last ones.
        modules: All modules of the model by name.
    """

    def __init__(self, model: nn.Module, head: Sequence[str] = (), depth: float = 1.0) -> None:
        self.model = model
        self.head = tuple(head)
        self.depth = depth
        self.modules = dict(model.named_modules())

    def in_head(self, name: str) -> bool:
        """Whether a module or parameter is the head or lies in it."""
        return within(name, self.head)

    def in_depth(self, name: str) -> bool:
        """Whether a module lies in the last share of the blocks, or runs after the first of these."""
        return self.depth == 1 or name in self._last

    @cached_property
    def _last(self) -> frozenset[str]:
        blocks = set(self.attention_blocks.values())
        return last_modules(self.modules, blocks, self.head, self.depth)

    @cached_property
    def outermost_blocks(self) -> list[str]:
        """Names of the outermost blocks in the order of a forward; none where no kind of block is known."""
        return outermost_blocks(self.modules, set(self.attention_blocks.values()), self.head)

    @cached_property
    def attentions(self) -> dict[str, list[Projection]]:
        """Projections of every module that owns those of an attention, by its name."""
        attentions = {}
        for name, module in self.modules.items():
            parts = projections(module)
            if parts:
                attentions[name] = parts
        return attentions

    @cached_property
    def attention_layers(self) -> dict[str, str]:
        """Name of the whole attention layer, with the shells around it, for each of `attentions`."""
        return {core: self._outermost_shell(core) for core in self.attentions}

    def _outermost_shell(self, core: str) -> str:
        layer = core
        for parent in parents(core):
            if not is_attention_shell(self.modules[parent]):
                break
            layer = parent
        return layer

    @cached_property
    def attention_blocks(self) -> dict[str, str]:
        """Name of the block around each of `attentions`."""
        blocks = {}
        for core, layer in self.attention_layers.items():
            # In diffusers, an element of a list called `attentions`; else the parent.
            element = re.search(r"^(.*\battentions\.\d+)(\.|$)", layer)
            blocks[core] = element.group(1) if element else layer.rpartition(".")[0]
        return blocks

    @cached_property
    def _projections(self) -> dict[tuple[str, str], Projection]:
        """Projections by the name of their layer and of their weight."""
        by_weight = {}
        for core, parts in self.attentions.items():
            for projection in parts:
                by_weight[projection.layer_in(core), projection.weight] = projection
        return by_weight

    @cached_property
    def _readers(self) -> dict[tuple[int, str], list[Reader]]:
        """Modules that read a tensor without calling its layer, by `id` of the layer and name of the tensor.

        A layer that several modules share has several names in the model, but one `id`.
        """
        readers: dict[tuple[int, str], list[Reader]] = {}
        for name, module in self.modules.items():
            for path in reads(type(module)):  # type: ignore[arg-type]  # a class is hashable
                for layer, layer_path, tensor in resolved(module, path):
                    readers.setdefault((id(layer), tensor), []).append(Reader(name, layer_path))
        return readers

    @cached_property
    def works_in_place(self) -> bool:
        """Whether a module of the model may change its input in place."""
        return any(_works_in_place(module) for module in self.modules.values())

    def readers(self, layer: nn.Module, *tensors: str) -> tuple[Reader, ...]:
        """Modules that read one of the layer's tensors without calling the layer, the outermost first."""
        readers: set[Reader] = set()
        for tensor in tensors:
            readers.update(self._readers.get((id(layer), tensor), ()))
        return tuple(sorted(readers, key=lambda reader: (len(reader.name), reader.name)))

    def sites(self, *kinds: str) -> Iterator[Site]:
        """Yield every place outside the head with a weight of one of these kinds, in model order."""
        for name, module in self.modules.items():
            if self.in_head(name):
                continue
            for site in self._sites_of(name, module):
                if not kinds or site.kind in kinds:
                    yield site

    def _sites_of(self, name: str, module: nn.Module) -> Iterator[Site]:
        if kind_of(module):
            yield self._site(name, module, "weight", "bias")
        for projection in self.attentions.get(name, ()):
            if projection.path == "" and projection.weight != "weight":
                yield self._site(name, module, projection.weight, projection.bias)

    def _site(self, name: str, module: nn.Module, weight: str, bias: str) -> Site:
        readers = self.readers(module, weight, bias)
        if readers and own_tensor(module, bias) is None and (id(module), bias) not in self._readers:
            bias = ""  # The reader brings a bias of its own, as BEiT's q_bias and v_bias.
        projection = self._projections.get((name, weight))
        draft = Draft(overwritten=self.works_in_place)
        return Site(name, module, weight, bias, projection, readers, draft=draft)

    def blocks(self) -> Iterator[TransformerBlock]:
        """Yield the blocks in depth and outside the head with an attention, one MLP and a norm before it."""
        attention_layers = set(self.attention_layers.values())
        for name, module in self.modules.items():
            if not name or self.in_head(name) or not self.in_depth(name):
                continue
            children = list(module._modules)
            attentions = tuple(child for child in children if f"{name}.{child}" in attention_layers)
            mlps = [child for child in children if self._is_whole_mlp(f"{name}.{child}")]
            norm = _norm_before_mlp(children, len(attentions))
            # Of several MLPs, as in TNT, each has a residual stream of its own.
            if attentions and len(mlps) == 1 and norm:
                yield TransformerBlock(name, module, attentions, mlps[0], norm)

    def _is_whole_mlp(self, name: str) -> bool:
        module = self.modules.get(name)
        return module is not None and not kind_of(module) and is_mlp(name, module)

    def erased(self, site: Site) -> bool:
        """Whether a norm right after the site's layer undoes a scale and shift of its output."""
        norm = self._after.get(site.name)
        channels = site.output_channels
        return norm is not None and erases_scale(norm) and norm_channels(norm) == channels

    @cached_property
    def _after(self) -> dict[str, nn.Module]:
        """Layer with a weight that follows each, inside the same parent, in order of registration."""
        layers = [name for name, module in self.modules.items() if kind_of(module)]
        layers_inside: Counter[str] = Counter()
        for name in layers:
            layers_inside.update(parents(name))
        following = {}
        for name, after in pairwise(layers):
            # A module around this layer alone, as MONAI's Convolution, stands for it.
            unit = name
            for parent in parents(name):
                if layers_inside[parent] == 1:
                    unit = parent
            parent = unit.rpartition(".")[0]
            after = self._numbered_norm(unit, after) or after
            if not parent or after.startswith(f"{parent}."):
                following[name] = self.modules[after]
        return following

    def _numbered_norm(self, unit: str, after: str) -> str:
        """Name of `norm1` for `conv1`, unless a norm follows in the same parent; "" if there is none.

        Numbers pair them where all convolutions are registered before all norms, as in MONAI's UnetResBlock.
        """
        parent, _, last = unit.rpartition(".")
        number = re.fullmatch(r"conv(\d+)", last)
        if number is None:
            return ""
        prefix = f"{parent}.".lstrip(".")
        if after.startswith(prefix) and kind_of(self.modules[after]) == "norm":
            return ""
        norm = f"{prefix}norm{number[1]}"
        if norm not in self.modules:
            return ""
        return norm

    def layer(self, name: str) -> Layer:
        """Look at a module as a selective method sees it."""
        return Layer(name, self.modules[name], *self._attention_of.get(name, ("", "")))

    @cached_property
    def _attention_of(self) -> dict[str, tuple[str, str]]:
        """Nearest attention layer, and nearest block around one, of every module; "" for none."""
        layers, blocks = set(self.attention_layers.values()), set(self.attention_blocks.values())
        return {name: (_nearest(name, layers), _nearest(name, blocks)) for name in self.modules}

    def has_role(self, name: str, role: str) -> bool:
        """Whether the layer has a role of a target, itself or through a module around it."""
        if role == "attention":
            return bool(self.layer(name).attention)
        if role == "mlp":
            return any(is_mlp(place, self.modules[place]) for place in (name, *parents(name)))
        if role == "conv":
            return is_conv(self.modules[name])
        return role == kind_of(self.modules[name])


def _nearest(name: str, places: set[str]) -> str:
    """The module of that name, or the nearest one around it, that is one of `places`; "" for none."""
    for place in (name, *parents(name)):
        if place in places:
            return place
    return ""


def _works_in_place(module: nn.Module) -> bool:
    """Whether a module may change its input in place, by its attribute `inplace` or its source."""
    inplace = getattr(module, "inplace", None)
    if inplace is not None:
        return inplace is True
    return not kind_of(module) and overwrites(type(module))  # type: ignore[arg-type]  # a class is hashable


def _norm_before_mlp(children: list[str], attentions: int) -> str:
    """Name of the norm whose input is the residual stream after the last attention; "" for none."""
    if attentions > 1 and "norm3" in children:
        return "norm3"
    return next((name for name in _NORM_BEFORE_MLP if name in children), "")
