"""Other values in the place of a model's own: put in, and brought back whatever happens meanwhile.

`disabled`, for one, puts the base's values in the place of the trained ones for a `with` block.

- What was there is kept on the model's record before anything is written, so no local variable alone holds
  trained values.
- An interrupt may come at any line. What brings values back can be done twice, and is (`Settled`).
- Where nobody is left to bring them back, after a block that was ended by force, or in a deepcopy of a model
  made inside a block, the next call does so (`recovered`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import Tensor, nn

from ..architecture.caches import empty_caches
from ..errors import require
from ..sharding import is_sharded, like, reshard
from .record import Adapted, Applied, Aside, adapted_layers, applied, own_state, require_applied
from .running import (
    Token,
    close_block,
    has_open_block,
    innermost_strength,
    open_block,
    strengths_elsewhere,
    switching,
)
from .strength import between


class Settled:
    """A `with` block that calls a function at its end, which completes or undoes what was done inside.

    Write `with settled, settled:`. It is then called twice. If an interrupt cuts the first call short, the
    second makes up for it; otherwise the second finds nothing to do.
    """

    def __init__(self, settle: Callable[[], None]) -> None:
        self.settle = settle

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call the function, after an error too."""
        self.settle()


@torch.no_grad()
def put(
    model: nn.Module, record: Applied, action: str, values: Mapping[str, Tensor], *, swaps: bool = False
) -> None:
    """Put values into a model, by name, after the record has what was there.

    They are copied into the tensors of these names; where there is none of that shape, one is created.

    Args:
        model: The model.
        record: Its record.
        action: Name of the call that does so. Blocks of one action may overlap.
        values: The values, by name.
        swaps: Whether new tensors take the place of the old ones, which a backward pass may still need.
            Sharded tensors are written to all the same: FSDP2 puts its own back whenever the layer runs.
    """
    reshard(model)
    present = _tensors(model)
    written, placed = {}, {}
    for name, value in values.items():
        fits = name in present and present[name].shape == value.shape
        if fits and (not swaps or is_sharded(present[name])):
            written[name] = like(value, present[name])
        else:
            placed[name] = value
    aside = Aside(action)
    for name in written:
        aside.values[name] = present[name].detach().clone()
    for name in placed:
        aside.tensors[name] = present.get(name)
    record.aside = aside
    _write(model, present, written)
    _place(model, placed)


@contextmanager
def others_in_place(
    model: nn.Module,
    action: str,
    values: Callable[[Adapted], Mapping[str, Tensor]],
    *,
    swaps: bool = False,
    strength: float | None = None,
) -> Iterator[None]:
    """Put other values in the place of the trained ones, with the adapters off, for a `with` block.

    Blocks of one action may be open at once. The first puts its values in, later ones find them there, and
    the last brings the trained ones back. So may blocks with a strength, whatever their action: the innermost
    one decides.

    Args:
        model: The model.
        action: Name of the call that does so.
        values: Computes the values, by name, of the adapted model. It is called when no other thread can put
            values in or bring them back meanwhile.
        swaps: As in `put`.
        strength: The values are then the base's, and inside there is base + strength · (trained − base). The
            adapters act at that strength too.

    Raises:
        MedpeftError: the model is merged meanwhile, or another thread is in a block of another strength.
    """
    require_applied(model)
    block = Token(strength=strength)

    def settle() -> None:
        close_block(model, block)
        record = applied(model)
        if record is not None:
            recover(model, record, action)
            _follow(model, record, action)

    settled = Settled(settle)
    with settled, settled:
        with switching(model, action):
            _require_agreement(model, action, strength)
            adapted = recovered(model, action)  # A block that was cut short may have left half of its values.
            if not _joins(adapted.record.aside, action, strength):
                require_acting(adapted, action)
                _put_between(adapted, action, values(adapted), strength, swaps=swaps)
            open_block(model, block)
            _switch(model, adapted.record, strength)
        yield


def _put_between(
    adapted: Adapted, action: str, values: Mapping[str, Tensor], strength: float | None, *, swaps: bool
) -> None:
    """Put values in, or with a strength what lies between them and the trained ones, and note it."""
    others = between(values, adapted.trained, strength)
    put(adapted.model, adapted.record, action, others, swaps=swaps)
    assert adapted.record.aside is not None
    adapted.record.aside.strength = strength


def _switch(model: nn.Module, record: Applied, strength: float | None) -> None:
    """Switch the adapters off, or let them act at a strength."""
    if strength is None:
        _enable(model, False)
    else:
        _bring_in(model, record, strength)


def _joins(aside: Aside | None, action: str, strength: float | None) -> bool:
    """Whether a block can build on what an open one has put aside."""
    if aside is None:
        return False
    if strength is None:
        return aside.action == action
    return aside.strength is not None


def _require_agreement(model: nn.Module, action: str, strength: float | None) -> None:
    """Raise `MedpeftError` where another thread is in a block of another strength: a model has one."""
    if strength is None:
        return
    for other in strengths_elsewhere(model):
        require(
            other == strength,
            f"{action} at strength {strength:g}, while another thread is within a block at {other:g}: a "
            "model has one strength at a time. Wait for that block, or give each thread a copy of it.",
        )


def _follow(model: nn.Module, record: Applied, action: str) -> None:
    """Go back to the strength of the block around, after one within it has ended."""
    if record.aside is None or record.aside.strength is None or not has_open_block(model):
        return
    if record.aside.strength == innermost_strength(model):
        return
    with switching(model, action):
        strength = innermost_strength(model)
        if record.aside is not None and strength is not None:
            _bring_in(model, record, strength)


@torch.no_grad()
def _bring_in(model: nn.Module, record: Applied, strength: float) -> None:
    """Let the methods act at a strength, where the trained values are aside. It can be done twice."""
    aside = record.aside
    assert aside is not None
    if aside.strength != strength:
        aside.strength = math.nan  # Until all of it is in place.
        reshard(model)
        present = _tensors(model)
        values = between(record.base or {}, aside.values, strength)
        _write(model, present, fitting(present, values))
    _enable(model, strength != 0, strength)
    aside.strength = strength


def require_acting(adapted: Adapted, action: str) -> None:
    """Raise `MedpeftError` inside `disabled`, `scaled` or `merged`: the trained values are not in place."""
    require(
        adapted.acting,
        f"{action} does not work inside disabled(model), scaled(model, …) or merged(model): leave it first.",
    )


def _enable(model: nn.Module, enabled: bool, strength: float = 1.0) -> None:
    """Switch all adapters on or off, and let them act at a strength."""
    for _, _, adapters in adapted_layers(model):
        adapters.enabled, adapters.strength = enabled, strength


@torch.no_grad()
def restore(model: nn.Module, record: Applied) -> None:
    """Bring back what is aside, and switch the adapters on.

    Values whose tensor the user has replaced by one of another shape, such as a new head's, are given up.
    """
    aside = record.aside
    if aside is None:
        return
    reshard(model)
    present = _tensors(model)
    for name, tensor in aside.tensors.items():
        if tensor is not None and name in present:
            tensor.data = tensor.data.to(present[name])  # The model may have been moved or cast meanwhile.
    _place(model, aside.tensors)
    _write(model, present, fitting(present, aside.values))
    _enable(model, True)
    record.aside = None


def recover(model: nn.Module, record: Applied, action: str) -> None:
    """Bring back what is aside, unless a block is open that needs it there."""
    if record.aside is None or has_open_block(model):
        return
    with switching(model, action):
        if not has_open_block(model):  # Another thread may have opened one meanwhile.
            restore(model, record)


def recovered(model: nn.Module, action: str) -> Adapted:
    """Look at a model, after bringing back whatever is aside that no open block needs there.

    Raises:
        MedpeftError: it is not adapted.
    """
    adapted = Adapted.of(model)
    if adapted.acting:
        return adapted
    recover(model, adapted.record, action)
    return Adapted.of(model)


def fitting(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out values whose tensor is gone or has another shape, as of a head that was replaced."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return {name: value for name, value in values.items() if shapes.get(name) == value.shape}


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Map names to all parameters and buffers; those of adapters also go by their names in a file."""
    tensors: dict[str, Tensor] = dict(own_state(model))
    tensors.update(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def _write(model: nn.Module, present: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into the tensors of their names."""
    for name, value in values.items():
        present[name].copy_(value)
    empty_caches(model)


def _place(model: nn.Module, tensors: Mapping[str, Tensor | None]) -> None:
    """Register tensors under their names, in the place of others; a module that is gone is left out."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        path, _, key = name.rpartition(".")
        module = modules.get(path)
        if module is None:
            continue
        if key in module._buffers:
            module._buffers[key] = tensor
        elif tensor is None or isinstance(tensor, nn.Parameter):
            module._parameters[key] = tensor
        else:
            module._parameters[key] = nn.Parameter(tensor, requires_grad=False)
