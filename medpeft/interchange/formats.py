"""What the formats of other libraries can express, and those libraries compute from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapters.adapter import Adapter, weight_name
from ..architecture.convolution import slides_plainly
from ..architecture.layers import kind_of, lies_transposed
from ..architecture.network import Network
from ..formulas.loha import LoHa
from ..formulas.lokr import LoKr
from ..formulas.lora import LoRA


@dataclass(frozen=True)
class Format:
    """A library's files, and what that library leaves out.

    Attributes:
        name: The library, for messages.
        methods: Those that its files hold.
        head: Whether they hold a head.
        biases: Whether they hold trained biases.
        embeddings: Whether the library adapts embeddings.
        attentions: Whether it adapts `nn.MultiheadAttention` as a whole.
        transposed: Whether it adapts transformers' `Conv1D`.
        biases_of_lora: Whether they hold LoRA with a bias of its own.
        of_all: Options of which a file has one value for all layers.
        lacks: Options that the library has not.
        ignores: Attributes of a convolution that it does not heed, by method.
        dims: Axes of the weights of layers that it adapts, by method.
        misplaces: Whether it misplaces the kernel of a Conv1d in a Kronecker product.
    """

    name: str
    methods: tuple[str, ...]
    head: bool = False
    biases: bool = False
    embeddings: bool = False
    attentions: bool = False
    transposed: bool = False
    biases_of_lora: bool = False
    of_all: tuple[str, ...] = ("dropout",)
    lacks: tuple[str, ...] = ()
    ignores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dims: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    misplaces: bool = False


_ALL = ("groups", "padding_mode", "dilation")

PEFT = Format(
    "peft",
    ("lora", "loha", "lokr"),
    head=True,
    biases=True,
    embeddings=True,
    attentions=True,
    transposed=True,
    biases_of_lora=True,
    of_all=("dropout", "dora", "bias", "tucker", "both", "factor", "input_factor"),
    lacks=("input_factor",),
    ignores={"lora": _ALL, "loha": ("padding_mode",), "lokr": ("padding_mode",)},
    dims={"loha": (2, 3, 4), "lokr": (2, 3, 4)},
    misplaces=True,
)
DIFFUSERS = Format(
    "diffusers", ("lora",), transposed=True, of_all=("dropout", "dora"), ignores={"lora": _ALL}
)
KOHYA = Format(
    "LyCORIS",
    ("lora", "loha", "lokr"),
    ignores={"lora": ("padding_mode",), "loha": ("padding_mode",), "lokr": ("padding_mode",)},
)


def inexpressible(network: Network, name: str, adapter: nn.Module, into: Format) -> str:
    """Say why a library cannot compute what the adapter of a layer does; "" if it can.

    A method that its files do not hold at all is none of the reasons.
    """
    if not isinstance(adapter, (LoRA, LoHa, LoKr)) or adapter.method not in into.methods:
        return ""
    if not name:
        return f"the model is itself the layer, and {into.name} names layers of a model: wrap it in one"
    if isinstance(adapter, LoRA) and adapter.bias is not None:
        reason = _of_bias(network, name, adapter, into)
        if reason:
            return reason
    layer: Any = network.modules[name]
    method = adapter.method
    weight = weight_name(adapter)
    if weight != "weight" or network.readers(layer, "weight", "bias"):
        alone = all(
            reader.name == attention_around(name) for reader in network.readers(layer, weight, "bias")
        )
        if into.attentions and method == "lora" and alone and in_whole_attention(network, name):
            return _with_dora(adapter, f"DoRA in nn.MultiheadAttention is nothing that {into.name} computes")
        return f"other code reads its weight without calling it, so that {into.name}'s wrapper would not act"
    kind = kind_of(layer)
    if kind == "embedding" and into.embeddings and method == "lora":
        return _of_embedding(layer, adapter, into)
    if kind not in ("linear", "conv") or (
        lies_transposed(layer) and not (into.transposed and method == "lora")
    ):
        return f"{type(layer).__name__} is no Linear and no convolution"
    if kind == "conv":
        return _ignored(layer, method, into) or _misplaced(layer, adapter, into)
    return ""


def _of_bias(network: Network, name: str, adapter: LoRA, into: Format) -> str:
    """Say why LoRA with a bias of its own cannot be written; "" if it can."""
    if not into.biases_of_lora:
        return f"LoRA with a bias of its own has no place in files of {into.name}: use bias=False"
    if adapter.magnitude is not None:
        return f"DoRA with a bias of its own is nothing that {into.name} computes: use bias=False"
    if in_whole_attention(network, name):
        return f"{into.name} takes no bias of LoRA in nn.MultiheadAttention: use bias=False"
    return ""


def _with_dora(adapter: Adapter, reason: str) -> str:
    """Return the reason if an adapter is DoRA, else ""."""
    if isinstance(adapter, LoRA) and adapter.magnitude is not None:
        return reason
    return ""


def _of_embedding(layer: Any, adapter: Adapter, into: Format) -> str:
    """Say why LoRA of an embedding cannot be written; "" if it can."""
    if layer.max_norm is not None:
        return f"{into.name}'s LoRA of an embedding ignores max_norm"
    return _with_dora(
        adapter, f"DoRA of an embedding learns the norms of its columns in {into.name}, of its rows here"
    )


def attention_around(name: str) -> str:
    """Name of the attention of which a layer called `out_proj` is a part; any other name stays."""
    if name.rpartition(".")[2] == "out_proj":
        return name.rpartition(".")[0]
    return name


def in_whole_attention(network: Network, name: str) -> bool:
    """Whether a layer is an `nn.MultiheadAttention` with one `in_proj_weight`, or the `out_proj` of one."""
    attention = network.modules.get(attention_around(name))
    if not isinstance(attention, nn.MultiheadAttention):
        return False
    return attention.in_proj_weight is not None


def _ignored(layer: Any, method: str, into: Format) -> str:
    """Say what of a convolution a library leaves out; "" if nothing."""
    if layer.weight.ndim not in into.dims.get(method, (layer.weight.ndim,)):
        return f"{into.name}'s {method} knows no {type(layer).__name__}"
    plain = {"groups": layer.groups == 1, "padding_mode": layer.padding_mode == "zeros"}
    plain["dilation"] = set(layer.dilation) == {1}
    ignored = [name for name in into.ignores[method] if not plain[name]]
    if not slides_plainly(layer):
        ignored.append("what this class does to its weight or input")
    if not ignored:
        return ""
    return f"{into.name}'s convolutions ignore {' and '.join(ignored)}"


def _misplaced(layer: Any, adapter: nn.Module, into: Format) -> str:
    """Say what a library does to LoKr of a `Conv1d`; "" if it puts the product together in order.

    peft 0.21 multiplies C, (a, b), and D, (c, d, kernel), as if C were (1, a, b): the numbers come in the
    order (c, a, d, b, kernel), where the weight has (a, c, b, d, kernel). With a core it raises. As a product
    of two matrices D is (c, d·kernel), and with a C of one number nothing can be out of order.
    """
    if not into.misplaces or not isinstance(adapter, LoKr) or layer.weight.ndim != 3:
        return ""
    outputs, inputs = layer.weight.shape[:2]
    is_product = "up" in adapter.second and "core" not in adapter.second
    if is_product or adapter.shape[:2] == (outputs, inputs):
        return ""
    if "core" in adapter.second:
        return f"{into.name} 0.21 fails at LoKr with a core on a Conv1d: use tucker=False"
    return f"{into.name} 0.21 orders LoKr of a Conv1d in another way where D is whole: use a smaller rank"
