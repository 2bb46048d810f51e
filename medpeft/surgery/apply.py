"""What a user does to a model: apply, disabled, remove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.batchnorm import freeze_statistics, release_statistics
from ..adapters.bias_gradients import sum_to_biases
from ..adapters.record import Applied, adapted_layers, require_applied, set_applied, trained_tensors
from ..adapters.registry import Method, Methods
from ..architecture.head import Head
from ..architecture.site import Site
from ..architecture.targets import Target
from ..errors import MedpeftError, require
from ..sharding import overwrite, reshard
from .install import attach, detach
from .plan import Plan, build, plan


def apply(
    model: nn.Module,
    method: Methods,
    *,
    target: Target = None,
    exclude: Target = None,
    head: Head = "auto",
    batchnorm: str | None = None,
    keep_base: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Make a model train a few parameters, in place; its classes and the keys of its `state_dict` stay.

    Args:
        model: Any `nn.Module`, with its pretrained weights loaded.
        method: A name of `methods()`, a union "a+b", or a dict of options by name; there a method may also have a "target"
            and an "exclude" of its own.
        target: Which layers: a glob of their names ("blocks.*"; a name picks everything inside), a role ("attention", "mlp",
            "linear", "conv", "norm", "embedding"), a compiled regular expression, a layer type, a predicate
            `(name, layer) -> bool`, or several of these. None leaves it to the method.
        exclude: Layers to leave out, written in the same way.
        head: The task's own last layer, trained whole and saved: "auto" to find it, its name, or None for no head.
        batchnorm: "frozen" keeps the running statistics in training too; "adapt" updates and saves them. None is "frozen"
            for every method but `full`.
        keep_base: Keep the trained parameters' original values in CPU memory, for `disabled` and `remove`. None is True for
            every method but `full`.
        dtype: dtype of the adapters; None is float32, or float64 where the layer has it.
        seed: Seed of the adapters' initial values, which leave torch's own random state alone.
        **options: Options of the method.

    Returns:
        `model` itself.

    Raises:
        MedpeftError: an unknown method, option or pattern; a method that fits nothing here; a model that is compiled,
            sharded, wrapped in DistributedDataParallel or adapted already. The model is untouched.
    """
    planned = plan(
        model, method, target=target, exclude=exclude, head=head, batchnorm=batchnorm, keep_base=keep_base,
        dtype=dtype, seed=seed, **options,
    )  # fmt: skip
    return carry_out(planned)


def carry_out(planned: Plan, built: Sequence[tuple[Method, Site, Adapter]] | None = None) -> nn.Module:
    """Do what a plan says, with adapters that were built for it if there are any."""
    model, record = planned.model, planned.record
    built = build(planned) if built is None else built
    if record.base is not None:
        record.base = {name: _kept(tensor) for name, tensor in trained_tensors(model, record)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.selected)
    attach(model, [(method.name, site, adapter) for method, site, adapter in built])
    sum_to_biases(model)
    if record.batchnorm == "frozen":
        freeze_statistics(model)
    set_applied(model, record)
    return model


def _kept(tensor: Tensor) -> Tensor:
    """A copy in CPU memory; a meta tensor has nothing to copy."""
    return tensor.detach() if tensor.is_meta else tensor.detach().to("cpu", copy=True)


def remove(model: nn.Module) -> nn.Module:
    """Make the model the base again, bit for bit, with no trace of medpeft.

    Raises:
        MedpeftError: nothing was applied, the original values were given up with `keep_base=False`, or the model is disabled
            or merged for the moment.
    """
    record = require_applied(model)
    require_acting(model, record, "remove")
    _put(model, record, _base(record, "remove"))
    forget(model)
    return model


def forget(model: nn.Module) -> None:
    """Take adapters, hooks and record off; the model's own tensors stay as they are."""
    record = require_applied(model)
    detach(model)
    release_statistics(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trained_before.get(name, True))
    set_applied(model, None)


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """The base, bit for bit, for the duration of a `with` block.

    Raises:
        MedpeftError: nothing was applied, the original values were given up with `keep_base=False`, or the model is merged for
            the moment.
    """
    record = require_applied(model)
    before = record.enabled
    if before:
        require_acting(model, record, "disabled")
    base = _base(record, "disabled")
    reshard(model)
    trained = {name: tensor.detach().clone() for name, tensor in trained_tensors(model, record)}
    _switch(model, record, base, enabled=False)
    try:
        yield model
    finally:
        _switch(model, record, trained, enabled=before)


def _switch(model: nn.Module, record: Applied, values: dict[str, Tensor], *, enabled: bool) -> None:
    record.enabled = enabled
    _put(model, record, values)
    for _, _, adapters in adapted_layers(model):
        adapters.enabled = enabled


def _put(model: nn.Module, record: Applied, values: dict[str, Tensor]) -> None:
    """Give the tensors that training changes other values."""
    reshard(model)
    overwrite((tensor, values[name]) for name, tensor in trained_tensors(model, record))


def require_acting(model: nn.Module, record: Applied, action: str) -> None:
    """Raise `MedpeftError` inside `disabled` or `merged`, where other values than the trained ones are in place."""
    off = not record.enabled or any(not adapters.enabled for _, _, adapters in adapted_layers(model))
    require(not off, f"{action} does not work inside disabled(model) or merged(model): leave that first.")


def _base(record: Applied, action: str) -> dict[str, Tensor]:
    if record.base is None:
        raise MedpeftError(
            f"{action} needs the original values, which {record.name!r} gave up: pass keep_base=True to apply (the default of "
            "every method but 'full')."
        )
    return record.base
