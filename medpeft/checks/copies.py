"""A twin of a model has trainable tensors and buffers of its own: what is tried on it leaves the model alone, bit for bit.

Its frozen parameters are the model's own, or all of it is fake tensors, which have shapes and no values.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FunctionType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ..adapters.record import applied
from ..errors import MedpeftError

Found = TypeVar("Found")


def real_twin(model: nn.Module) -> nn.Module:
    """A copy that shares the frozen parameters' memory and owns all else.

    Raises:
        MedpeftError: the model cannot be copied; the message says why.
    """
    return _copy(model, lambda tensor: tensor if _is_frozen(tensor) else _own(tensor))


def own_twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy that owns everything, in another floating-point type if asked.

    Raises:
        MedpeftError: the model cannot be copied; the message says why.
    """
    return _copy(model, lambda tensor: _own(tensor, dtype))


def on_fakes(step: Callable[[nn.Module, Any], Found], model: nn.Module, example: Any) -> Found:
    """What `step(twin, input)` finds on a copy and an input without values; a model on the meta device becomes one on the CPU.

    Raises:
        MedpeftError: the model cannot be copied, or asks for values; the message says which.
    """
    # Tensors that the model holds out of sight are taken along.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    twin = _copy(model, lambda tensor: _fake(tensor, mode))
    inputs = mapped(example, lambda tensor: _fake(tensor, mode))
    try:
        with mode, torch.enable_grad(), _unlogged("torch._subclasses.fake_tensor"):
            return step(twin, inputs)
    except MedpeftError:
        raise
    except Exception as error:
        raise MedpeftError(
            f"{type(model).__name__} does not run on fake tensors: {type(error).__name__}: {str(error).strip() or 'no message'}"
        ) from error
    finally:
        _forget_cached(model)


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Without that logger's messages: a failure is raised, and where fake tensors fail, real ones are tried."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _copy(model: nn.Module, twin_of: Callable[[Tensor], Tensor]) -> nn.Module:
    originals = {id(tensor): tensor for tensor in _held_tensors(model)}
    memo: dict[int, Any] = {key: twin_of(tensor) for key, tensor in originals.items()}
    for module in model.modules():
        record = applied(module)
        if record is not None:  # It holds the base's values, which a twin only reads.
            memo[id(record)] = record
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise MedpeftError(
            f"This {type(model).__name__} cannot be copied, and it is tried out on a copy: {type(error).__name__}: {error}. "
            "Pass the plain model, before it is compiled, sharded or wrapped for training on several devices."
        ) from error


def _held_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and the tensors that modules hold as plain attributes or in lists and dicts."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                yield from tensors_in(value)


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _own(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    own = cast_floats(tensor.detach().clone(), dtype)
    return nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own


def cast_floats(value: Any, dtype: torch.dtype | None) -> Any:
    """Nested tensors with the floating-point ones in another type; unchanged for None."""
    return mapped(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    device = torch.device("cpu") if tensor.is_meta else tensor.device
    with mode:
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested lists, tuples and mappings with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of an output: a tensor, or any nesting of tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (tensor for item in value.values() for tensor in tensors_in(item))
    elif isinstance(value, (list, tuple)):
        yield from (tensor for item in value for tensor in tensors_in(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from (tensor for field in dataclasses.fields(value) for tensor in tensors_in(getattr(value, field.name, None)))


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point outputs of the model for an input, a tuple of inputs, or a mapping of keyword inputs.

    Raises:
        MedpeftError: there is none.
    """
    if isinstance(example, tuple):
        output = model(*example)
    else:
        output = model(**example) if isinstance(example, Mapping) else model(example)
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point() or tensor.is_complex()]
    if not found:
        raise MedpeftError(f"{type(model).__name__} returned {type(output).__name__} without a floating-point tensor in it.")
    return found


def seed(number: int) -> None:
    """Seed torch's generators that are in use; one that is not yet stays as it is, unlike with `torch.manual_seed`."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@contextmanager
def undisturbed() -> Iterator[list[str]]:
    """Leaves torch's, NumPy's and Python's random state as it was; yields the texts of the warnings given inside."""
    numbers, array = random.getstate(), np.random.get_state()  # noqa: NPY002 - the state a model's code may draw from
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    heard: list[str] = []
    try:
        with torch.random.fork_rng(list(devices)), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield heard
            finally:
                heard.extend(str(warning.message) for warning in caught)
    finally:
        random.setstate(numbers)
        np.random.set_state(array)  # noqa: NPY002


def _forget_cached(model: nn.Module) -> None:
    """Empty the function caches that the model's classes and their source files use: a fake tensor may lie there."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls not in (nn.Module, object)}
    files = {cls.__module__ for cls in classes} & set(sys.modules)
    for namespace in (*classes, *(sys.modules[name] for name in files)):
        for function in list(vars(namespace).values()):
            # A decorator around functools' own, such as transformers', hides the cache in its closure.
            for found in (function, *_closure(function)):
                if type(found).__name__ == "_lru_cache_wrapper":
                    found.cache_clear()


def _closure(function: Any) -> Iterator[Any]:
    """What a function holds from the function that made it."""
    # Not isinstance: it asks a lazy import, of which MONAI has many, for its class, and that raises.
    for cell in (function.__closure__ or ()) if type(function) is FunctionType else ():
        with suppress(ValueError):  # A cell may still be empty.
            yield cell.cell_contents
