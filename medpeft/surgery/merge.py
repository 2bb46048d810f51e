"""Merging: put what `Adapter.merged` returns into the layers' own parameters. No method has merge code of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import covering
from ..adapters.record import adapted_layers, require_applied
from ..architecture.convolution import standardises
from ..architecture.layers import own_tensor
from ..errors import MedpeftError, require
from ..sharding import gathered, is_sharded, like, overwrite, reshard, whole
from .apply import forget, require_acting

_log = logging.getLogger("medpeft")

Values = dict[tuple[str, str], Tensor]


def merge(model: nn.Module, *, example_input: Any = None, tolerance: float = 1e-4, min_kept: float = 0.9) -> nn.Module:
    """Fold every adapter into its layer, for good: a plain model with plain keys and no inference cost.

    Everything is computed in float32 or wider and checked before the model is touched.

    Args:
        model: A model after `apply`, on which nothing but the adapters' hooks acts.
        example_input: An input (or a tuple of them): the outputs before and after are then compared, in eval mode.
        tolerance: Largest difference accepted there, relative to the largest output.
        min_kept: In float16 and bfloat16 a small update is partly rounded away; merging is refused where less than this share
            of a layer's update would be kept. 0 accepts any loss.

    Returns:
        `model` itself. A layer that got a bias it did not have is named in a warning, the outputs' difference in the log.

    Raises:
        MedpeftError: an adapter cannot be merged (each is named, with the reason), too little of an update would be kept, or
            the outputs differ by more than `tolerance`. The model is untouched.
    """
    require_applied(model)
    values = _merged_values(model, min_kept)
    if example_input is not None:
        before = _outputs(model, example_input)
        with _swapped(model, values):
            after = _outputs(model, example_input)
        difference = _difference(before, after)
        _log.info("merged outputs differ by %.2e of the largest", difference)
        require(
            difference <= tolerance,
            f"The merged outputs would differ by {difference:.2e} of the largest one, more than tolerance={tolerance:.2e}: is "
            "the weight in low precision? Nothing was merged.",
        )
    reshard(model)
    created = [f"{name}.{tensor}" for name, tensor in values if own_tensor(model.get_submodule(name), tensor) is None]
    for (name, tensor), value in values.items():
        _put(model.get_submodule(name), tensor, value)
    forget(model)
    if created:
        warnings.warn(
            f"merge created {', '.join(created)}: the unadapted model has no such keys, so load this state into one that has "
            "(load_state_dict with strict=False would drop them).",
            stacklevel=2,
        )
    return model


@contextmanager
def merged(model: nn.Module, *, min_kept: float = 0.9) -> Iterator[nn.Module]:
    """The model with every adapter folded into its layer for the duration of a `with` block, then as before, bit for bit.

    Args:
        model: A model after `apply`.
        min_kept: As in `merge`.

    Raises:
        MedpeftError: as `merge`.
    """
    require_applied(model)
    with _swapped(model, _merged_values(model, min_kept)):
        yield model


@torch.no_grad()
def _merged_values(model: nn.Module, min_kept: float) -> Values:
    """New tensors by layer and name; nothing in the model changes."""
    require_acting(model, require_applied(model), "merging")
    reshard(model)
    values: Values = {}
    problems = []
    holders = _holders(model)
    for name, layer, adapters in adapted_layers(model):
        if standardises(layer) and (adapters.acting(on_output=True) or adapters.entering()):
            problems.append(f"{name}: {type(layer).__name__} standardises its weight, which undoes what is merged into it")
            continue
        never = next((adapter.unmergeable for adapter in adapters.every() if adapter.unmergeable), "")
        try:
            require(not never, never)
            with gathered([layer, *adapters.modules()]):
                new = covering(layer, adapters.every())
        except MedpeftError as reason:
            problems.append(f"{name}: {reason}")
            continue
        for tensor, value in new.items():
            own = own_tensor(layer, tensor)
            tied = [n for n in holders.get(id(own), []) if n != f"{name}.{tensor}".lstrip(".")]
            kept = 1.0 if own is None else _kept(own, value)
            if own is None and any(is_sharded(p) for p in layer.parameters(recurse=False)):
                problems.append(f"{name}: it has no {tensor}, and a sharded layer can get none: merge the unsharded model")
            if tied:
                problems.append(f"{name}: its {tensor} is tied to {tied[0]}, which has no such adapter")
            elif kept < min_kept:
                problems.append(f"{name}: {value.dtype if own is None else own.dtype} would keep {kept:.0%} of the update")
            values[name, tensor] = value.to(_dtype(layer)) if own is None else like(value, own)
    if problems:
        shown = "\n  ".join(problems[:10]) + (f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise MedpeftError(
            f"{require_applied(model).name!r} cannot be merged into this {type(model).__name__}:\n  {shown}\nNothing was "
            "changed. Run the adapted model as it is, call model.float() first if precision is the reason, or pass min_kept=0."
        )
    return values


def _holders(model: nn.Module) -> dict[int, list[str]]:
    """Names under which each parameter stands in distinct modules."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for tensor, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{name}.{tensor}".lstrip("."))
    return found


def _kept(own: Tensor, value: Tensor) -> float:
    """Share of an update that rounding to the weight's dtype keeps: 1 − ‖lost‖ / ‖update‖."""
    if own.is_meta or own.dtype not in (torch.float16, torch.bfloat16):
        return 1.0
    wide = value.float()
    size = torch.linalg.vector_norm(wide - whole(own).float())
    lost = torch.linalg.vector_norm(wide - value.to(own.dtype).float())
    return 1.0 if size == 0 else max(0.0, 1.0 - float(lost / size))


def _dtype(layer: nn.Module) -> torch.dtype | None:
    return next((p.dtype for p in layer.parameters(recurse=False)), None)


def _put(layer: nn.Module, tensor: str, value: Tensor) -> None:
    """Write into the layer's own tensor, or give it the parameter it lacked."""
    own = own_tensor(layer, tensor)
    if own is None:
        layer.register_parameter(tensor, nn.Parameter(value))
    else:
        with torch.no_grad():
            own.copy_(value)


@contextmanager
def _swapped(model: nn.Module, values: Values) -> Iterator[None]:
    """Other tensors in the place of the layers' own, and the adapters off, for a while."""
    reshard(model)
    before: list[tuple[dict[str, Any], str, Any]] = []
    shards: list[tuple[Tensor, Tensor]] = []
    for (name, tensor), value in values.items():
        layer = model.get_submodule(name)
        store: dict[str, Any] = layer._buffers if tensor in layer._buffers else layer._parameters
        own: Any = store.get(tensor)
        if is_sharded(own):
            # FSDP2 has a hold of its own on it, and puts it back whenever the layer runs.
            shards.append((own, value))
            continue
        before.append((store, tensor, own))
        store[tensor] = value if store is layer._buffers else nn.Parameter(value, requires_grad=False)
    trained = overwrite(shards)
    for _, _, adapters in adapted_layers(model):
        adapters.enabled = False
    try:
        yield
    finally:
        reshard(model)
        overwrite(trained)
        for store, tensor, own in before:
            store[tensor] = own
        for _, _, adapters in adapted_layers(model):
            adapters.enabled = True


@torch.no_grad()
def _outputs(model: nn.Module, example_input: Any) -> list[Tensor]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        output = model(*example_input) if isinstance(example_input, tuple) else model(example_input)
    finally:
        for module, mode in modes:
            module.training = mode
    return [t for t in torch.utils._pytree.tree_leaves(_plain(output)) if isinstance(t, Tensor)]


def _plain(output: Any) -> Any:
    """A dataclass output as a dict, which torch knows how to flatten."""
    return dict(vars(output)) if hasattr(output, "__dataclass_fields__") else output


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = [(b.double(), a.double()) for b, a in zip(before, after, strict=True) if b.numel()]
    return max((float((b - a).abs().max() / b.abs().max().clamp(min=1e-30)) for b, a in pairs), default=0.0)
