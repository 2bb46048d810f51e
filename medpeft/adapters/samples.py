"""A sample of each of the base's tensors, taken by `apply`: by it a base that has changed is noticed.

- It costs far less than a copy. Other weights, flips, permutations and quantising change almost every element
  and are noticed; a change of a few elements of a large tensor can be missed.
- A model may be cast or averaged after `apply`: values that were merely rounded count as the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from ..architecture.quantised import unpack
from ..sharding import whole
from .adapter import weight_name
from .record import Adapted, Applied, own_tensors

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}
"""Types of which torch cannot take elements, with those that it takes the same bytes by."""

SAMPLES = 256
"""Elements taken of each tensor."""

_DRIFT = 2.0**11
"""Units of rounding by which an average of equal values may drift; 1,400 were measured at decay 0.9999."""

OTHER_VALUES = "has other values than at apply"
GONE = "is no longer there"


def sample(tensor: Tensor) -> Tensor:
    """Take elements from all over a tensor, whole and detached, to CPU memory."""
    flat = tensor
    if tensor.element_size() == 1:
        flat = tensor.view(torch.uint8)  # torch can take elements of few types of that size; not of float8.
    elif tensor.dtype in _SIGNED:
        flat = tensor.view(_SIGNED[tensor.dtype])
    taken = torch.take(flat, _positions(flat.numel()).to(flat.device))
    return taken.cpu().view(tensor.dtype)


@lru_cache(maxsize=256)
def _positions(numel: int) -> Tensor:
    """Indices spread evenly by multiples of the golden ratio: a constant step could stay in one column."""
    if numel <= SAMPLES:
        return torch.arange(numel, device="cpu")
    golden = 0x9E3779B97F4A7C15  # 2⁶⁴ over the golden ratio
    return torch.tensor([(i * golden % 2**64) * numel >> 64 for i in range(SAMPLES)], device="cpu")


def sample_base(model: nn.Module, record: Applied) -> dict[str, Tensor]:
    """Sample what is to stay as it is, by name: weights that are not selected, and frozen statistics."""
    samples = {}
    unpack(model)
    for name, tensor in _base_tensors(model, record):
        values = whole(tensor)
        if _has_plain_values(values):
            samples[name] = sample(values)
    return samples


def _base_tensors(model: nn.Module, record: Applied) -> Iterator[tuple[str, Tensor]]:
    changing = {*record.selected, *record.statistics}
    for name, tensor in own_tensors(model):
        # Other buffers, such as counters, may change with every forward.
        is_kept = isinstance(tensor, nn.Parameter) or is_statistic(name)
        if is_kept and name not in changing:
            yield name, tensor


def is_statistic(name: str) -> bool:
    """Whether a tensor of this name is a running statistic of a norm."""
    return name.endswith(("running_mean", "running_var"))


def changed_statistics(changes: dict[str, str]) -> list[str]:
    """List the running statistics that changed while all weights stayed: they were reset or estimated anew.

    Where weights have changed too, the statistics belong to another base.
    """
    if all(map(is_statistic, changes)):
        return [name for name, change in changes.items() if change == OTHER_VALUES]
    return []


def _has_plain_values(tensor: Tensor) -> bool:
    """Whether elements can be taken of a tensor; quantised and fake ones are of types of their own."""
    return type(tensor) is Tensor and not tensor.is_meta


def changes_since_apply(model: nn.Module, record: Applied) -> dict[str, str]:
    """Find the base's tensors that are not as they were at `apply`.

    Returns:
        By name `OTHER_VALUES` or `GONE`. Of a sharded model every rank has to ask.
    """
    unpack(model)
    present: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    present.update(model.named_buffers(remove_duplicate=False))
    changes = {}
    for name, before in record.samples.items():
        if name not in present:
            changes[name] = GONE
        elif not present[name].is_meta and not _is_as_before(before, whole(present[name])):
            changes[name] = OTHER_VALUES
    return changes


def _is_as_before(before: Tensor, tensor: Tensor) -> bool:
    """Whether a sample is that of the tensor, or was before it was rounded to a lower precision."""
    if not _has_plain_values(tensor):
        return False
    now = sample(tensor)
    if before.shape != now.shape:
        return False
    if not before.is_floating_point() or not now.is_floating_point():
        return before.dtype == now.dtype and torch.equal(before, now)
    for precision in (before.dtype, now.dtype, torch.float16, torch.bfloat16):
        rounded = before.to(precision).to(now.dtype).double()
        if torch.equal(rounded.nan_to_num(), now.double().nan_to_num()):
            return True
    return has_drifted(before, now)


def has_drifted(before: Tensor, now: Tensor) -> bool:
    """Whether each value moved in proportion to itself, and by no more than averaging equal ones may."""
    if before.shape != now.shape or before.dtype != now.dtype or not before.is_floating_point():
        return False
    most = min(_DRIFT * torch.finfo(before.dtype).eps, 2.0**-9)
    return bool(((now - before).abs() <= most * before.abs()).all())


def made_of_other_weights(adapted: Adapted, changes: dict[str, str]) -> dict[str, str]:
    """Find the layers with an adapter that was made of a weight which changed since `apply`.

    What an adapter makes of its weight is a buffer that no file holds: loading makes it anew.

    Returns:
        By the layer's name the adapter's method.
    """
    methods = {}
    for layer_name, _, adapters in adapted.layers:
        for _, adapter in adapters.adapters():
            weight = f"{layer_name}.{weight_name(adapter)}".lstrip(".")
            unsaved = set(dict(adapter.named_buffers())).difference(adapter.state_dict())
            if weight in changes and unsaved:
                methods[layer_name] = adapter.method
    return methods
