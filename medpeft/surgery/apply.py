"""Apply methods to a model, and remove them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.aside import Settled, put, recovered, require_acting, restore
from ..adapters.batchnorm import freeze_statistics, release_statistics
from ..adapters.record import (
    Adapted,
    Applied,
    BatchNormPolicy,
    applied,
    require_applied,
    set_applied,
    trained_tensors,
)
from ..adapters.requests import Methods
from ..adapters.running import switching
from ..adapters.samples import sample_base
from ..architecture.head import Head
from ..architecture.targets import Target
from ..errors import require
from .build import build
from .install import Built, install, uninstall
from .observe import with_inputs
from .plan import Plan, plan
from .strength import base_values


def apply(
    model: nn.Module,
    method: Methods,
    *,
    target: Target = None,
    exclude: Target = None,
    depth: float = 1.0,
    head: Head = "auto",
    batchnorm: BatchNormPolicy | None = None,
    keep_base: bool | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    data: Iterable[Any] | None = None,
    **options: Any,
) -> nn.Module:
    """Make a model train a few parameters, in place; its classes and the keys of its `state_dict` stay.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "lora", rank=2, target="0", head="2")
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        ['0.adapters.lora.down', '0.adapters.lora.up', '2.weight', '2.bias']

    Args:
        model: Any `nn.Module`, with its pretrained weights loaded.
        method: A name of `methods()`, a union "a+b" in any order, or a dict of options by name; there a
            method may also have a "target" and an "exclude" of its own.
        target: Which layers: a glob of their names ("blocks.*"; a name picks all inside), a role
            ("attention", "mlp", "linear", "conv", "norm", "embedding"), a compiled regular expression, a
            type, a predicate `(name, layer) -> bool`, or several of these. None leaves it to the method.
        exclude: Layers to leave out, written in the same way.
        depth: Share of the model's blocks in which layers are taken: the last ones, and what runs after. At
            least one block. Backward does not go through what lies before; 1 is the whole model.
        head: The task's own last layer, trained whole and saved: "auto" to find it, its name, or None.
        batchnorm: "frozen" keeps the running statistics in training too; "adapt" updates and saves them. None
            is "frozen" for every method but `full`.
        keep_base: Keep the trained parameters' original values in CPU memory, for `disabled` and `remove`.
            None is True for every method but `full`.
        dtype: dtype of the adapters; None is float32, or float64 where the layer has it.
        seed: Seed of the adapters' initial values, which leave torch's own random state alone.
        data: Batches on which the model is run once, in eval mode, for methods that start from what enters
            its layers (`lora` with init="eva"); each an input or a tuple of inputs, on the model's device.
        **options: Options of the method: a value, or a dict of patterns to values, of which the first counts.

    Returns:
        `model` itself.

    Raises:
        MedpeftError: an unknown method, option or pattern; a method that fits nothing here; a model that is
            compiled, sharded, wrapped in DistributedDataParallel or adapted already. The model is untouched.
    """
    return carry_out(with_inputs(plan(
        model, method, target=target, exclude=exclude, depth=depth, head=head, batchnorm=batchnorm,
        keep_base=keep_base, dtype=dtype, seed=seed, **options,
    ), data))  # fmt: skip


def carry_out(
    planned: Plan, built: list[Built] | None = None, values: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Carry out a plan; a call that fails or is interrupted leaves the model as it was.

    Args:
        planned: The plan.
        built: The adapters that were built for it; None builds new ones.
        values: Tensors of a checkpoint to copy into the model, by name.
    """
    model, record = planned.model, planned.record
    if built is None:  # What `load` has built may serve inference alone.
        _require_trainable(model)
        built = build(model, planned.sites, record)
    if record.base is not None:
        record.base = {name: _kept(tensor) for name, tensor in trained_tensors(model, record)}
    record.samples = sample_base(model, record)
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def settle() -> None:
        if applied(model) is record:
            record.aside = None
            return
        restore(model, record)
        _take_off(model, record)
        for parameter, gradient in gradients:
            parameter.grad = gradient

    settled = Settled(settle)
    with settled, settled:
        _put_on(model, record, built)
        put(model, record, "apply", values or {})
        set_applied(model, record)
    return model


def _put_on(model: nn.Module, record: Applied, built: list[Built]) -> None:
    """Choose what trains, install the adapters, and freeze the statistics."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in record.selected)
        parameter.grad = None  # An optimizer would move even what is frozen by an old one.
    install(model, built)
    freeze_statistics(model, record.statistics)


def _require_trainable(model: nn.Module) -> None:
    """Raise `MedpeftError` where autograd takes neither the model's tensors nor new ones."""
    inside = torch.is_inference_mode_enabled()
    for parameter in model.parameters():
        inside = inside or parameter.is_inference()
    require(
        not inside,
        "What is applied or made inside torch.inference_mode cannot train: make the model and call apply "
        "outside of it (torch.no_grad does no harm).",
    )


def _kept(tensor: Tensor) -> Tensor:
    """Copy a tensor to CPU memory; a meta tensor has nothing to copy."""
    if tensor.is_meta:
        return tensor.detach()
    return tensor.detach().to("cpu", copy=True)


def remove(model: nn.Module) -> nn.Module:
    """Make the model the base again, bit for bit, with no trace of medpeft.

    Raises:
        MedpeftError: nothing was applied, the original values were given up with `keep_base=False`, other
            weights were loaded since, or the model is disabled or merged for the moment.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> keys = list(model.state_dict())
        >>> medpeft.remove(medpeft.apply(model, "ssf", head="2")) is model
        True
        >>> list(model.state_dict()) == keys
        True
    """

    def base(adapted: Adapted) -> dict[str, Tensor]:
        return base_values(adapted, "remove")

    make_plain(model, "remove", base)
    return model


def make_plain(model: nn.Module, action: str, values: Callable[[Adapted], Mapping[str, Tensor]]) -> None:
    """Put values into a model for good and take all of medpeft off it: both, or, if interrupted, neither.

    The values are computed when no other thread can put values in or bring them back meanwhile.
    """
    require_applied(model)
    with switching(model, action):
        adapted = recovered(model, action)
        require_acting(adapted, action)
        _put_for_good(adapted, action, values(adapted))


def _put_for_good(adapted: Adapted, action: str, values: Mapping[str, Tensor]) -> None:
    model, record = adapted.model, adapted.record

    def settle() -> None:
        if applied(model) is record:
            restore(model, record)
        else:
            _take_off(model, record)

    settled = Settled(settle)
    with settled, settled:
        put(model, record, action, values)
        set_applied(model, None)


def forget(model: nn.Module) -> None:
    """Take adapters, wiring and record off; the model's own tensors stay as they are."""
    record = require_applied(model)
    set_applied(model, None)
    _take_off(model, record)


def _take_off(model: nn.Module, record: Applied) -> None:
    """Take adapters and wiring off, as far as they are there."""
    uninstall(model)
    release_statistics(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(record.trained_before.get(name, True))
