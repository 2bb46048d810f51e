"""The change of one layer, made from the tensors that a file holds for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from ..errors import CheckpointError, listed
from .hadamard import Hadamard
from .kronecker import Kronecker
from .matrices import Factors
from .products import Product, rank_of

Change = Factors | Hadamard | Kronecker

MERGE_THERE = "Merge it into the weights with the library that wrote it, and load these."
"""The way round what medpeft does not read."""

# What the key of a tensor ends in: peft's names, kohya's, and those of diffusers before it took over peft's.
PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora_down.weight": "A",
    "lora_up.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_mid.weight": "core",
    "lora_B.bias": "bias",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    "lora.alpha": "alpha",
}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
PARTS.update({part: part for part in (*_LOHA, *_LOKR)})

_VECTORS = ("magnitude", "dora_scale", "bias")


def make_change(
    what: str, parts: Mapping[str, Tensor], scale: Callable[[int, float | None], float]
) -> Change:
    """Make LoRA, LoHa or LoKr of one layer.

    Args:
        what: File and layer, for messages.
        parts: Tensors by what they are, of the values of `PARTS`.
        scale: Computes the factor of the change from its rank (0 for none) and α (None without one).

    Raises:
        CheckpointError: a part is missing, no matrix, or of another method.
    """
    left = dict(parts)
    _require_matrices(what, left)
    alpha = None
    if "alpha" in left:
        alpha = float(left.pop("alpha"))
    change: Change
    try:
        if any(part in _LOHA for part in left):
            first, second = _pop_product(left, "hada_w1", "hada_t1"), _pop_product(left, "hada_w2", "hada_t2")
            change = Hadamard(first, second, scale(max(first.rank, second.rank), alpha))
        elif any(part in _LOKR for part in left):
            C, D = _pop_whole_or_product(left, "lokr_w1"), _pop_whole_or_product(left, "lokr_w2", "lokr_t2")
            change = Kronecker(C, D, scale(max(rank_of(C), rank_of(D)), alpha))
        else:
            change = _pop_lora(what, left, lambda rank: scale(rank, alpha))
    except KeyError as error:
        raise CheckpointError(f"{what} has {listed(parts)}, and no {error.args[0]}.") from error
    if left:
        raise CheckpointError(
            f"{what} has {listed(left)}, which medpeft's {change.method!r} has not. {MERGE_THERE}"
        )
    return change


def _require_matrices(what: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse parts that are no numbers or of a wrong number of axes."""
    for part, tensor in parts.items():
        shape = tuple(tensor.shape)
        if part != "alpha" and not tensor.is_floating_point():
            raise CheckpointError(f"{what}: {part} is of {tensor.dtype}, which LoRA is not kept in.")
        if part == "alpha" and tensor.numel() != 1:
            raise CheckpointError(f"{what}: alpha is no single number but of shape {shape}.")
        axes = 2
        if part in _VECTORS:
            axes = 1
        if part != "alpha" and (tensor.ndim < axes or tensor.numel() == 0):
            raise CheckpointError(f"{what}: {part} has {axes} axes at least, and is of shape {shape}.")


def _pop_lora(what: str, parts: dict[str, Tensor], scale: Callable[[int], float]) -> Factors:
    """Take A and B of LoRA out of the parts, and what goes with them."""
    if "embedding_A" in parts:
        # peft's B is (dim, r) and its A (r, rows): those of the transposed weight.
        A = parts.pop("embedding_B").transpose(0, 1)  # (dim, r) → (r, dim)
        B = parts.pop("embedding_A").transpose(0, 1)  # (r, rows) → (rows, r)
    else:
        A, B = parts.pop("A"), parts.pop("B")
    magnitude = parts.pop("magnitude", None)
    if "dora_scale" in parts:
        magnitude = parts.pop("dora_scale")
        if len(magnitude) == 1 < magnitude.numel():
            raise CheckpointError(
                f"{what} is DoRA of the norms of input channels (wd_on_output=False); medpeft's learns "
                f"those of output channels. {MERGE_THERE}"
            )
    if magnitude is not None:
        magnitude = magnitude.flatten()  # (1, out, 1 …) or (out, 1 …) → (out,)
    return Factors(A, B, scale(A.shape[0]), magnitude, parts.pop("core", None), parts.pop("bias", None))


def _pop_whole_or_product(parts: dict[str, Tensor], name: str, core: str = "") -> Tensor | Product:
    """Take a factor of LoKr out of the parts: whole, or as a product."""
    if name in parts:
        return parts.pop(name)
    return _pop_product(parts, name, core)


def _pop_product(parts: dict[str, Tensor], name: str, core: str) -> Product:
    """Take a product out of the parts. With a core, its first factor is kept transposed."""
    up, down = parts.pop(f"{name}_a"), parts.pop(f"{name}_b")
    if core not in parts:
        return Product(up, down)
    return Product(up.transpose(0, 1), down, parts.pop(core))  # (r, out) → (out, r)


def parts_of(change: Change) -> dict[str, Tensor]:
    """List the tensors of a change by what they are, without its factor."""
    if isinstance(change, Factors):
        parts = {"A": change.A, "B": change.B}
        if change.magnitude is not None:
            parts["magnitude"] = change.magnitude
        if change.bias is not None:
            parts["bias"] = change.bias
        return parts
    if isinstance(change, Hadamard):
        return _parts_of(change.first, "hada_w1", "hada_t1") | _parts_of(change.second, "hada_w2", "hada_t2")
    return _parts_of(change.first, "lokr_w1", "") | _parts_of(change.second, "lokr_w2", "lokr_t2")


def _parts_of(value: Tensor | Product, name: str, core: str) -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {name: value}
    if value.core is None:
        return {f"{name}_a": value.up, f"{name}_b": value.down}
    up = value.up.t().contiguous()  # (out, r) → (r, out)
    return {f"{name}_a": up, f"{name}_b": value.down, core: value.core}
