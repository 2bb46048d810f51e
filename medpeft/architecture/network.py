"""Which layers of a model a method is offered, and which of them a target or an exclusion picks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from torch import nn

from .attention import Projection, is_attention_shell, projections
from .layers import erases_scale, is_mlp, kind_of, norm_channels, own_tensor
from .site import Draft, Reader, Site
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
    def _readers(self) -> dict[tuple[int, str], list[Reader]]:
        """Modules that read a tensor without calling its layer, by identity of the layer and name of the tensor.

        By identity, since a layer that several modules share stands in the model under several names.
        """
        readers: dict[tuple[int, str], list[Reader]] = {}
        for name, module in self.modules.items():
            for path in reads(type(module)):  # type: ignore[arg-type]  # mypy does not see that a class is hashable
                for layer, layer_path, tensor in _resolve(module, path):
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
        """Every place outside the head with a weight of one of these kinds, in the order of the model."""
        for name, module in self.modules.items():
            if self.inside(name, self.head):
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
        return module is not None and not kind_of(module) and is_mlp(name, module)

    def erased(self, site: Site) -> bool:
        """Whether a batch or instance norm right after the site's layer undoes a scale and shift of its output."""
        norm = self._after.get(site.name)
        host = site.host
        channels = host.shape[1] * getattr(site.layer, "groups", 1) if site.kind == "transposed" else host.shape[0]
        return norm is not None and erases_scale(norm) and norm_channels(norm) == channels

    @cached_property
    def _after(self) -> dict[str, nn.Module]:
        """The layer with a weight that follows each, inside the same parent, by the order in which they were registered."""
        names = [name for name, module in self.modules.items() if kind_of(module)]
        around = Counter(a for name in names for a in _ancestors(name))
        found = {}
        for name, after in pairwise(names):
            # A module around this layer alone, as MONAI's Convolution, stands for it.
            unit = next((a for a in _ancestors(name) if around[a] == 1), name)
            parent, _, own = unit.rpartition(".")
            # Where all convolutions are registered before all norms, as in MONAI's UnetResBlock, numbers pair them.
            numbered = f"{parent}.{re.sub('^conv', 'norm', own)}".lstrip(".")
            follows = after.startswith(f"{parent}.".lstrip(".")) and kind_of(self.modules[after]) == "norm"
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
        kind = kind_of(self.modules[name])
        return role == ("conv" if kind == "transposed" else kind)


def _works_in_place(module: nn.Module) -> bool:
    """Whether a module may change its input in place, as it says itself or by what its `forward` does."""
    said = getattr(module, "inplace", not kind_of(module) and overwrites(type(module)))  # type: ignore[arg-type]  # as above
    return said is True


def _ancestors(name: str) -> list[str]:
    """Names of the modules around a layer, the outermost first, the model itself left out."""
    steps = name.split(".")
    return [".".join(steps[:i]) for i in range(1, len(steps))]


def _resolve(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, str]]:
    """Yield each layer below `module` that a path with `*` for any index names, its own path, and the tensor's name."""
    *steps, tensor = path.split(".")
    layers = [("", module)]
    for step in steps:
        below = []
        for layer_path, layer in layers:
            for child_name, child in layer._modules.items():
                if child is not None and step in ("*", child_name):
                    below.append((f"{layer_path}.{child_name}".lstrip("."), child))
        layers = below
    for layer_path, layer in layers:
        if own_tensor(layer, tensor) is not None or tensor in layer._parameters:
            yield layer, layer_path, tensor


def _norm_before_mlp(children: list[str], attentions: int) -> str:
    """By name, the norm whose input is the residual stream after the (last) attention."""
    third = ("norm3",) if attentions > 1 else ()
    names = (*third, "norm2", "ln_2", "layernorm_after", "layer_norm2", "final_layer_norm", "ffn_norm", "norm_mlp")
    return next((name for name in names if name in children), "")
