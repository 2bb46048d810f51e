"""A forward that is cut at a place: run up to it, or go on from it.

The model is not touched. For one call a stand-in of it is made, and of the modules on the way to those that
are replaced: objects of the same class that share everything with theirs, parameters too. So several threads
may run the model and its parts at once, an interrupt leaves nothing behind, and what is merged, removed or
disabled in the model is so in its rest.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import running
from ..adapters.record import applied
from ..adapters.stand_in import rebound, replace_below, sharing_all
from ..adapters.wiring import acting
from ..checks.copies import call, tensors_in
from ..errors import MedpeftError, listed, require
from .blank import Blank, filled, sizes
from .place import Place

Forwards = dict[str, Callable[..., Any]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Route:
    """How to run a model up to a place, and on from it.

    Attributes:
        place: The place.
        features: What passes it.
        skipped: By name of a module that need not run again, what it returns.
        example: The model's input, without its values.
        tensors: Names of the parameters and buffers on which the features depend.
        output: Takes out of what the model returns what matters; None for all of it.
    """

    place: Place
    features: Blank
    skipped: dict[str, Any]
    example: Any
    tensors: tuple[str, ...]
    output: Callable[[Any], Any] | None


class _ReachedError(BaseException):
    """Ends a forward at the place. No model catches it, as it is no `Exception`."""

    def __init__(self, features: Tensor) -> None:
        self.features = features


@torch.no_grad()
def run_until(model: nn.Module, route: Route, example: Any) -> Tensor:
    """Run a model up to the place and return what passes it, images first."""
    place = route.place
    module = model.get_submodule(place.module)
    forwards: Forwards = {place.module: partial(_stop, module, place)}
    try:
        call(_with_forwards(model, forwards), example)
    except _ReachedError as reached:
        axis = route.features.batch_axis or 0
        return reached.features.detach().movedim(axis, 0).contiguous()
    raise MedpeftError(f"{type(model).__name__} did not come by {place} for this input.")


def require_frozen(model: nn.Module, route: Route) -> None:
    """Raise `MedpeftError` if a method trains something before the place: features then change in training.

    The model may have got other adapters since, by `apply`, `load` or a bank.
    """
    record = applied(model)
    changing = []
    if record is None or record.sites:  # Without a record there may be adapters in a model inside this one.
        changing += _acting_in(model, route.skipped)
    if record is not None:
        changing += [name for name in route.tensors if name in record.selected]
    require(
        not changing,
        f"{listed(changing, most=1)} comes before {route.place} and is trained by what was applied since "
        "medpeft.prefix was called: call it again, and compute the features anew.",
    )


def _acting_in(model: nn.Module, names: Iterable[str]) -> list[str]:
    """List the layers with adapters that act inside some modules: which takes as long as a small head."""
    layers = []
    for name in names:
        for inside, module in model.get_submodule(name).named_modules(prefix=name):
            if acting(module) is not None:
                layers.append(inside)
    return layers


def run_from(
    model: nn.Module,
    route: Route,
    features: Tensor,
    note: Callable[[str, Tensor], None] = lambda name, zeros: None,
) -> Any:
    """Run a model on from the place.

    Args:
        model: The model.
        route: The place, and what is left out.
        features: What `run_until` returned.
        note: Called with every tensor of zeros that stands for what is left out, and with its maker's name.
    """
    images, device = len(features), features.device

    def zeros(name: str, blank: Blank) -> Tensor:
        made = blank.zeros(images, device)
        note(name, made)
        return made

    laid_out = _as_at_place(features, route.features)
    place = route.place
    forwards: Forwards = {}
    for name, output in route.skipped.items():
        forwards[name] = partial(_skip, output, images, partial(zeros, name))
    if place.side == "input":
        forwards[place.module] = partial(_enter, model.get_submodule(place.module), place.key, laid_out)
    else:
        output = route.skipped[place.module]
        forwards[place.module] = partial(_leave, output, images, partial(zeros, ""), place.key, laid_out)
    example = filled(route.example, images, partial(zeros, ""))
    returned = call(_with_forwards(model, forwards), example)
    return route.output(returned) if route.output else returned


def _as_at_place(features: Tensor, blank: Blank) -> Tensor:
    """Give features the dtype and the order in memory that they had at the place."""
    axis = blank.batch_axis or 0
    expected = sizes(blank.shape, len(features))
    moved = features.to(blank.dtype).movedim(0, axis)
    require(
        list(moved.shape) == expected,
        f"Features of the shape {tuple(features.shape)} do not fit: the model goes on from "
        f"{tuple(size for at, size in enumerate(expected) if at != axis)} for each image.",
    )
    back = sorted(range(moved.ndim), key=lambda at: blank.order[at])
    laid_out = moved.permute(blank.order).contiguous().permute(back)
    if blank.is_changed and laid_out.data_ptr() == features.data_ptr():
        return laid_out.clone()  # The caller's features stay as they are.
    return laid_out


def _with_forwards(module: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> nn.Module:
    """Make an object that shares everything with a module, in which modules below have other forwards."""
    copy = sharing_all(module)
    if "" in forwards:
        copy.__dict__["forward"] = forwards[""]
        # The original runs its own hooks and its own checkpointing, if it runs at all.
        copy.__dict__.update((name, OrderedDict()) for name in _HOOKS)
        if "gradient_checkpointing" in copy.__dict__:
            copy.__dict__["gradient_checkpointing"] = False
        return copy
    if "forward" in module.__dict__:
        forward = rebound(module.__dict__["forward"], module, copy)
        if forward is None:
            raise MedpeftError(
                f"A {type(module).__name__} has a forward that was put on it and cannot be bound to another "
                f"module: take it off before medpeft.prefix."
            )
        copy.__dict__["forward"] = forward
    replace_below(copy, forwards, _with_forwards)
    return copy


def _stop(module: nn.Module, place: Place, *args: Any, **kwargs: Any) -> Any:
    """End the forward with what enters or leaves a module."""
    if place.side == "input":
        value = kwargs[place.key] if isinstance(place.key, str) else args[place.key]
        raise _ReachedError(value)
    output = module(*args, **kwargs)
    assert isinstance(place.key, int)
    raise _ReachedError(list(tensors_in(output))[place.key])


def _skip(output: Any, images: int, zeros: Callable[[Blank], Tensor], *args: Any, **kwargs: Any) -> Any:
    """Return zeros in the place of what a module would return."""
    return filled(output, images, zeros)


def _enter(module: nn.Module, key: int | str, features: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Run a module on the features in the place of one of its inputs."""
    if isinstance(key, str):
        kwargs[key] = features
    else:
        args = (*args[:key], features, *args[key + 1 :])
    return module(*args, **kwargs)


def _leave(
    output: Any,
    images: int,
    zeros: Callable[[Blank], Tensor],
    key: int | str,
    features: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Return the features in the place of one of the tensors that a module would return."""
    position = itertools.count()

    def make(blank: Blank) -> Tensor:
        return features if next(position) == key else zeros(blank)

    return filled(output, images, make)


class Rest(nn.Module):
    """A model from a place on: it takes features, and trains the very parameters of the model.

    The model is its only child, so modes, devices and parameters are those of the model.

    Attributes:
        model: The model.
        route: The place, and what is left out.
    """

    def __init__(self, model: nn.Module, route: Route) -> None:
        super().__init__()
        self.model, self.route = model, route

    def forward(self, features: Tensor) -> Any:
        """Compute what the model gives for the images of these features."""
        if torch.compiler.is_compiling():
            return run_from(self.model, self.route, features)
        with running.counted(self.model):  # A switch of the model's adapters waits for it.
            require_frozen(self.model, self.route)
            return run_from(self.model, self.route, features)
