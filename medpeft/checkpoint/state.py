"""What training changed, as tensors in memory: to keep, to send, to average, and to put back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..adapters.record import Adapted, require_model
from ..adapters.running import switching
from ..errors import CheckpointError, clipped, listed
from .load import fill
from .save import plain, savable

Array = npt.NDArray[Any]


@overload
def state(model: nn.Module, *, numpy: Literal[False] = False) -> dict[str, Tensor]: ...


@overload
def state(model: nn.Module, *, numpy: Literal[True]) -> dict[str, Array]: ...


def state(model: nn.Module, *, numpy: bool = False) -> dict[str, Tensor] | dict[str, Array]:
    """Copy what `save` would write: adapters, selected parameters, head, BatchNorm statistics that adapt.

    Args:
        model: A model after `apply`. One sharded by FSDP2 is gathered: every rank has to call this.
        numpy: Give NumPy arrays, as federated frameworks exchange them; bfloat16 becomes float32, exactly.

    Returns:
        By name, on the CPU, sharing no memory with the model.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: the model is not as `apply` left it, as for `save`.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "lora", rank=2, target="0", head="1")
        >>> before = medpeft.state(model)
        >>> list(before)
        ['0.adapters.lora.down', '0.adapters.lora.up', '1.weight', '1.bias']
        >>> _ = torch.nn.init.zeros_(model[1].weight)
        >>> medpeft.load_state(model, before)
        >>> bool(model[1].weight.any())
        True
    """
    require_model(model)
    with switching(model, "state"):  # So that no other thread puts other values in meanwhile.
        saved = savable(model, "state").saved
        copies = {name: plain(tensor).clone() for name, tensor in saved.items()}
    if not numpy:
        return copies
    arrays = {}
    for name, tensor in copies.items():
        wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        arrays[name] = wide.numpy()
    return arrays


def load_state(model: nn.Module, state: Mapping[str, Tensor | Array]) -> None:
    """Put back what `state` copied, or values of the same names and shapes, such as an average of several.

    All or nothing: everything is checked before the first value is written, and a call that is interrupted
    writes all or none. Parameters stay the same objects, so optimizers keep theirs and a compiled model stays
    compiled.

    Args:
        model: A model after `apply`, with the methods, options and sites of the one that the state is from.
        state: Tensors or NumPy arrays by name. Floating-point numbers of another precision are converted.

    Raises:
        MedpeftError: nothing was applied.
        CheckpointError: names, shapes or kinds of numbers are not the model's, or a value is not finite.

    Examples:
        >>> import medpeft, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> model = medpeft.apply(model, "bias", head="1")
        >>> doubled = {name: 2 * tensor for name, tensor in medpeft.state(model).items()}
        >>> medpeft.load_state(model, doubled)
        >>> torch.equal(model[0].bias, doubled["0.bias"])
        True
    """
    require_model(model)
    with switching(model, "load_state"):
        adapted = savable(model, "load_state")
        fill(model, adapted.record, checked(adapted, state))


def checked(adapted: Adapted, state: Mapping[str, Tensor | Array]) -> dict[str, Tensor]:
    """Return the state as tensors that fit the model.

    Raises:
        CheckpointError: it does not.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(
            f"state={clipped(state)} must be a dict of tensors by name, as medpeft.state gives."
        )
    missing = [name for name in adapted.saved if name not in state]
    stray = [name for name in state if name not in adapted.saved]
    if missing or stray:
        about = [f"it lacks {listed(missing, most=2)}"] if missing else []
        about += [f"it has {listed(stray, most=2)}, which the model has not"] if stray else []
        raise CheckpointError(f"The state is not of this model: {' and '.join(about)}.")
    values = {}
    for name, present in adapted.saved.items():
        values[name] = _fitting(name, state[name], present)
    return values


def _fitting(name: str, value: object, present: Tensor) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            value = torch.from_numpy(np.array(value, order="C"))
        except TypeError as error:
            raise CheckpointError(f"{name!r} in the state is no array of numbers: {error}") from error
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{name!r} in the state is {clipped(value)}: it must be a tensor or an array.")
    if value.shape != present.shape:
        raise CheckpointError(
            f"{name!r} has the shape {tuple(value.shape)} in the state, and {tuple(present.shape)} "
            "in the model."
        )
    floats = value.is_floating_point() and present.is_floating_point()
    if value.dtype != present.dtype and not floats:
        raise CheckpointError(f"{name!r} is {value.dtype} in the state and {present.dtype} in the model.")
    converted = value.detach().to(present.dtype)
    if converted.is_floating_point() and not torch.isfinite(converted).all():
        raise CheckpointError(
            f"{name!r} in the state has values that are not finite. The model is as it was."
        )
    return converted
