"""Copies of a model to experiment on: the model itself stays as it is, bit for bit.

A copy has trainable tensors and buffers of its own. Its frozen parameters are copies too, or those of the
model. Or all its tensors are fake: they have shapes and no values.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters.record import Applied, applied
from ..architecture.layers import is_differentiable
from ..architecture.quantised import holds_integers
from ..errors import MedpeftError

Result = TypeVar("Result")


def copied(model: nn.Module, *, share_frozen: bool = False, dtype: torch.dtype | None = None) -> nn.Module:
    """Copy a model, in another floating-point type if asked, or with its frozen parameters shared."""

    def change(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter) and holds_integers(tensor):
            return copy.deepcopy(tensor)  # With its scales; and bitsandbytes packs it anew in inference.
        if share_frozen and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            return tensor
        return _like(tensor, cast_floats(tensor.detach().clone(), dtype))

    return _copy(model, change)


def without_values(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device."""
    return _copy(model, lambda tensor: _like(tensor, torch.empty_like(tensor, device="meta")))


def on_fakes(step: Callable[[nn.Module, Any], Result], model: nn.Module, example: Any) -> Result:
    """Run `step(copy, input)` without values, inside `undisturbed`.

    The meta device becomes that of the input, or the CPU.

    Raises:
        MedpeftError: the model cannot be copied, or asks for values; the message says which.
    """
    # A model may hold tensors where a copy does not reach, as in a closure. They stay real.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    first: Tensor | None = next(tensors_in(example), None)
    device = torch.device("cpu") if first is None or first.is_meta else first.device
    fake_model = _copy(model, lambda tensor: _fake(tensor, mode, device))
    inputs = mapped(example, lambda tensor: _fake(tensor, mode, device))
    # torch would log an error that is raised again here, or after which real tensors are tried.
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with mode:
            return step(fake_model, inputs)
    except MedpeftError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        raise MedpeftError(f"{type(model).__name__} does not run on fake tensors: {reason}") from error
    finally:
        logger.disabled = was_disabled
        _empty_caches(model)


def _copy(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copy a model with every tensor changed."""
    # deepcopy refuses tensors that a forward computed, and a model may keep some: its memo has copies.
    tensors = {id(tensor): tensor for tensor in _tensors_of(model)}
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        memo[key] = change(tensor)
    for module in model.modules():
        record = applied(module)
        if record is not None:  # It holds the base's values, which a copy only reads.
            memo[id(record)] = record
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MedpeftError(
            f"This {type(model).__name__} cannot be copied, and it is tried out on a copy: {reason}. "
            "Pass the plain model, before it is compiled, sharded or wrapped for training on several devices."
        ) from error


def _tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and tensors that modules hold as plain attributes or in lists and dicts."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules") and not isinstance(value, Applied):
                yield from tensors_in(value)


def _fake(tensor: Tensor, mode: FakeTensorMode, instead_of_meta: torch.device) -> Tensor:
    device = instead_of_meta if tensor.is_meta else tensor.device
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return _like(tensor, fake)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Return the value, as a parameter if the tensor is one."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(value, tensor.requires_grad)
    return value


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters of a model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def cast_floats(value: Any, dtype: torch.dtype | None) -> Any:
    """Cast the floating-point tensors of a nested value; None leaves all as they are."""
    return mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested lists, tuples and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    items = [mapped(item, change) for item in value]
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*items)
    return type(value)(items)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield every tensor of an output, a nesting of tuples, lists, mappings and dataclasses."""
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    for item in items:
        yield from tensors_in(item)


def call(model: nn.Module, example: Any) -> Any:
    """Call a model on an input, a tuple or a mapping of inputs."""
    if isinstance(example, tuple):
        return model(*example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(example)


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """Run a model on an input, a tuple or a mapping of inputs; return its floating-point outputs."""
    output = call(model, example)
    floating = [tensor for tensor in tensors_in(output) if is_differentiable(tensor)]
    if not floating:
        kind = type(output).__name__
        raise MedpeftError(f"{type(model).__name__} returned {kind} without a floating-point tensor in it.")
    return floating


@contextmanager
def undisturbed() -> Iterator[list[str]]:
    """Allow gradients, whatever the caller's mode, and restore torch's, NumPy's and Python's random state.

    Yields:
        Texts of the warnings given inside, complete at the end.
    """
    python_state = random.getstate()
    numpy_state = np.random.get_state()  # noqa: NPY002 - a model's code may draw from it
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    texts: list[str] = []
    try:
        with (
            torch.random.fork_rng(list(devices)),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            try:
                yield texts
            finally:
                texts.extend(str(warning.message) for warning in caught)
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def seed_everything(number: int) -> None:
    """Seed torch's generators that are in use; `torch.manual_seed` would seed those of unused devices too."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


def _empty_caches(model: nn.Module) -> None:
    """Empty the function caches in the files that define the model's classes: a fake tensor may lie there."""
    files = set()
    for module in model.modules():
        files |= {cls.__module__ for cls in type(module).__mro__}
    for file in files & set(sys.modules):
        for function in list(vars(sys.modules[file]).values()):
            for candidate in (function, *_closure(function)):
                if type(candidate).__name__ == "_lru_cache_wrapper":
                    candidate.cache_clear()


def _closure(function: Any) -> list[Any]:
    """List the values in a function's closure: a decorator of transformers hides a cache there."""
    # isinstance would ask a lazy import for its class, which raises. MONAI has many.
    if type(function) is not FunctionType:
        return []
    contents = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # A cell may still be empty.
            contents.append(cell.cell_contents)
    return contents
