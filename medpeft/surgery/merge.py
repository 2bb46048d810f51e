"""Merging: fold every adapter into its layer's own parameters, by `Adapter.merged` alone."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapters import Adapters
from ..adapters.aside import others_in_place
from ..adapters.options import require_options
from ..adapters.presence import require_present
from ..adapters.record import Adapted, own_tensors
from ..adapters.registry import find
from ..adapters.samples import changes_since_apply, made_of_other_weights
from ..adapters.wiring import branches_of
from ..architecture.convolution import standardises
from ..architecture.layers import is_differentiable, own_tensor
from ..errors import MedpeftError, require
from ..sharding import gathered, is_sharded, like, reshard, whole
from .apply import make_plain
from .outputs import largest_difference, outputs_of
from .unmergeable import Place, places, reason_against, require_floating, require_own

_log = logging.getLogger("medpeft")
_SHOWN = 10
_SHARES = {"tolerance": float, "min_kept": float}


@dataclass(frozen=True)
class Merged:
    """A tensor of a layer after merging.

    Attributes:
        layer_name: Name of the layer.
        layer: The layer.
        name: Name of the tensor in the layer.
        own: The layer's own tensor, None if merging creates it.
        value: The merged tensor, sharded as the layer's own.
    """

    layer_name: str
    layer: nn.Module
    name: str
    own: Tensor | None
    value: Tensor

    @property
    def full_name(self) -> str:
        """Name of the tensor in the model."""
        return f"{self.layer_name}.{self.name}".lstrip(".")


def merge(
    model: nn.Module, *, example_input: Any = None, tolerance: float = 1e-4, min_kept: float = 0.9
) -> nn.Module:
    """Fold every adapter into its layer for good: the result is a plain model without any cost at inference.

    The merged tensors are computed in float32 or wider, and checked before the model is touched.

    Args:
        model: A model after `apply`.
        example_input: An input (or a tuple of them): the outputs before and after are then compared, in eval
            mode.
        tolerance: Largest difference accepted there, relative to the largest output.
        min_kept: In float16 and bfloat16 a small update is partly rounded away; merging is refused where less
            than this share of a layer's update would be kept. 0 accepts any loss.

    Returns:
        `model` itself. A layer that got a bias it did not have is named in a warning, the outputs' difference
        in the log.

    Raises:
        MedpeftError: an adapter cannot be merged (each is named, with the reason), too little of an update
            would be kept, or the outputs differ by more than `tolerance`. The model is untouched.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "ssf", head="2")
        >>> list(medpeft.merge(model, example_input=torch.ones(1, 4)).state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    require_options("", {"tolerance": tolerance, "min_kept": min_kept}, _SHARES)
    created: list[str] = []

    def values(adapted: Adapted) -> dict[str, Tensor]:
        merged_tensors = _merged_tensors(adapted, min_kept)
        if example_input is not None:
            _require_same_outputs(adapted, merged_tensors, example_input, tolerance)
        created.extend(item.full_name for item in merged_tensors if item.own is None)
        return _values(merged_tensors)

    make_plain(model, "merge", values)
    if created:
        warnings.warn(_warning_of_created(created), stacklevel=2)
    return model


def _warning_of_created(names: list[str]) -> str:
    """Write the warning that merging created tensors."""
    return (
        f"merge created {', '.join(names)}: the unadapted model has no such keys, so load this state "
        f"into one that has (load_state_dict with strict=False would drop them)."
    )


def _values(merged_tensors: list[Merged]) -> dict[str, Tensor]:
    """Map the names of merged tensors to their values."""
    return {item.full_name: item.value for item in merged_tensors}


@contextmanager
def merged(model: nn.Module, *, min_kept: float = 0.9) -> Iterator[nn.Module]:
    """Fold every adapter into its layer for the duration of a `with` block.

    It waits for running forwards of other threads. After the block the model is as before, bit for bit.

    Args:
        model: A model after `apply`.
        min_kept: As in `merge`.

    Raises:
        MedpeftError: as `merge`.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "ssf", head="2", init="official")
        >>> x = torch.ones(1, 4)
        >>> adapted = model(x)
        >>> with medpeft.merged(model):
        ...     torch.allclose(model(x), adapted, atol=1e-5)
        True
    """
    require_options("", {"min_kept": min_kept}, _SHARES)

    def values(adapted: Adapted) -> dict[str, Tensor]:
        return _values(_merged_tensors(adapted, min_kept))

    with others_in_place(model, "merged", values, swaps=True):
        yield model


@torch.no_grad()
def _merged_tensors(adapted: Adapted, min_kept: float) -> list[Merged]:
    """Compute the merged tensors of every layer, without changing the model.

    Raises:
        MedpeftError: a layer cannot be merged; every such layer is named with the reason.
    """
    reshard(adapted.model)
    require_present(adapted.model, branches_of(adapted.model))
    merged_tensors: list[Merged] = []
    problems: list[str] = []
    others = places(adapted.model)
    outdated = made_of_other_weights(adapted, changes_since_apply(adapted.model, adapted.record))
    for layer_name, layer, adapters in adapted.layers:
        try:
            require(layer_name not in outdated, "its weight is not the one that was taken apart at apply")
            require_floating(layer)
            tensors = _merged_into(layer, adapters)
        except MedpeftError as reason:
            problems.append(f"{layer_name}: {reason}")
            continue
        for name, value in tensors.items():
            own = own_tensor(layer, name)
            item = Merged(layer_name, layer, name, own, _fitted(value, adapted.model, layer, own))
            problem = _problem(item, value, others, min_kept)
            if problem:
                problems.append(f"{layer_name}: {problem}")
            merged_tensors.append(item)
    if problems:
        raise MedpeftError(_cannot_merge(adapted, problems))
    return merged_tensors


def _merged_into(layer: nn.Module, adapters: Adapters) -> dict[str, Tensor]:
    """Compute the changed tensors of one layer.

    Raises:
        MedpeftError: an adapter has no equivalent weight.
    """
    in_order = adapters.in_merging_order()
    for adapter in in_order:
        require_own(layer, (adapter._weight, adapter._bias))
    if standardises(layer) and (adapters.order.leaving or adapters.order.entering):
        raise MedpeftError(
            f"{type(layer).__name__} standardises its weight, which undoes what is merged into it"
        )
    for adapter in in_order:
        reason = find(adapter.method).unmergeable
        require(not reason, reason)
    shared = [module for adapter in in_order for module in adapter.shared.values()]
    inside = [module for owner in (adapters, *shared) for module in owner.modules()]
    with gathered([layer, *inside]):
        return adapters.merged_tensors(layer, in_order)


def _fitted(value: Tensor, model: nn.Module, layer: nn.Module, own: Tensor | None) -> Tensor:
    """Give a merged tensor the dtype and shards of the layer's own, or the dtype of the tensors around it."""
    if own is not None:
        return like(value, own)
    for _, tensor in chain(layer.named_parameters(recurse=False), own_tensors(model)):
        if is_differentiable(tensor):
            return value.to(tensor.dtype)
    return value


def _problem(item: Merged, value: Tensor, others: dict[str, Place], min_kept: float) -> str:
    """Reason why a merged tensor cannot replace the layer's own, "" if it can."""
    own = item.own
    if own is None:
        if any(is_sharded(parameter) for parameter in item.layer.parameters(recurse=False)):
            return f"it has no {item.name}, and a sharded layer can get none: merge the unsharded model"
        return ""
    reason = reason_against(item.full_name, own, item.value, others)
    if reason:
        return reason
    kept = _share_kept(own, value)
    if kept < min_kept:
        return f"{own.dtype} would keep {kept:.0%} of the update"
    return ""


def _cannot_merge(adapted: Adapted, problems: list[str]) -> str:
    lines = problems[:_SHOWN]
    if len(problems) > _SHOWN:
        lines.append(f"… and {len(problems) - _SHOWN} more")
    shown = "\n  ".join(lines)
    return (
        f"{adapted.record.name!r} cannot be merged into this {type(adapted.model).__name__}:\n  {shown}\n"
        "Nothing was changed. Run the adapted model as it is, call model.float() first if precision is the "
        "reason, or pass min_kept=0."
    )


def _share_kept(own: Tensor, value: Tensor) -> float:
    """Share of an update that rounding to the weight's dtype keeps: 1 − ‖lost‖ / ‖update‖."""
    if own.is_meta or own.dtype not in (torch.float16, torch.bfloat16):
        return 1.0
    wide = value.float()
    update = torch.linalg.vector_norm(wide - whole(own).float())
    lost = torch.linalg.vector_norm(wide - value.to(own.dtype).float())
    if update == 0:
        return 1.0
    return max(0.0, 1.0 - float(lost / update))


def _require_same_outputs(
    adapted: Adapted, merged_tensors: list[Merged], example_input: Any, tolerance: float
) -> None:
    """Raise `MedpeftError` if the outputs of the merged model differ by more than the tolerance."""
    before = outputs_of(adapted.model, example_input)
    with others_in_place(adapted.model, "merged", lambda _: _values(merged_tensors), swaps=True):
        after = outputs_of(adapted.model, example_input)
    difference = largest_difference(before, after)
    _log.info("merged outputs differ by %.2e of the largest", difference)
    require(
        difference <= tolerance,
        f"The merged outputs would differ by {difference:.2e} of the largest one, more than "
        f"tolerance={tolerance:.2e}: is the weight in low precision? Nothing was merged.",
    )
