"""Trace of one forward: every operation with the memory that it reads and writes, and every module's call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..adapters.adapters import Adapters
from ..checks.connections import written
from ..checks.copies import call, tensors_in

_SHAPE_ALONE = (
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
)
_ASKS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim")


@dataclass
class Op:
    """An operation; memory is known by a number for each storage.

    Attributes:
        reads: Storages of its inputs, those whose shape alone counts left out.
        writes: Storages of its outputs.
        changes: Those of them that were there before: it writes into them.
        call: Position of the innermost call around it.
        is_random: Whether it draws random numbers.
        asks: Whether it takes values out of a tensor, on which Python may decide.
    """

    reads: frozenset[int]
    writes: frozenset[int]
    changes: frozenset[int]
    call: int
    is_random: bool
    asks: bool


class Moment(NamedTuple):
    """A moment: how many operations ran before, and how many calls began or ended before."""

    ops: int
    events: int


_NEVER = Moment(sys.maxsize, sys.maxsize)


@dataclass
class Call:
    """A call of a module.

    Attributes:
        name: Name of the module.
        parent: Position of the call around it; that of the model itself is -1.
        begin: When it began.
        args: Its inputs by position.
        kwargs: Its inputs by keyword.
        end: When it ended.
        output: What it returned.
    """

    name: str
    parent: int
    begin: Moment
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    end: Moment
    output: Any = None


@dataclass
class Trace:
    """What happened in one forward.

    Attributes:
        ops: All operations in order.
        calls: Calls of all modules but those of adapters, in order; that of the model comes first.
        inputs: Storages of the model's inputs.
        names: The storage of each of its parameters and buffers, by name.
        parameters: Storages of its parameters and buffers.
        trainable: Storages of its trainable parameters.
        outputs: Storages of its outputs.
    """

    ops: list[Op] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    inputs: frozenset[int] = frozenset()
    names: dict[str, int] = field(default_factory=dict)
    parameters: frozenset[int] = frozenset()
    trainable: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    _storages: dict[int, Any] = field(default_factory=dict)

    def storage(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage, and keep it, so that no number is given twice."""
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        return int(storage._cdata)

    def storages(self, value: Any) -> frozenset[int]:
        """Return the storages of all tensors in a nested value."""
        return frozenset(map(self.storage, tensors_in(value)))

    def changed(self, start: int, end: int | None = None) -> set[int]:
        """Storages that are written into between two times."""
        changed: set[int] = set()
        for op in self.ops[start:end]:
            changed |= op.changes
        return changed

    def around(self, call: int) -> list[int]:
        """List the positions of a call and of those around it, the innermost first."""
        positions = []
        while call >= 0:
            positions.append(call)
            call = self.calls[call].parent
        return positions


@torch.no_grad()
def traced(model: nn.Module, example: Any, output: Callable[[Any], Any] | None = None) -> Trace:
    """Trace one forward of a copy of a model in train mode, whose hooks stay.

    Args:
        model: The copy.
        example: Its input, a tuple or a mapping of inputs.
        output: Takes out of what it returns what matters; None for all of it.
    """
    trace = Trace()
    trace.inputs = trace.storages(example)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        trace.names[name] = trace.storage(tensor)
    trace.parameters = frozenset(trace.names.values())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trace.trainable = trace.storages(trained)
    recorder = _Recorder(trace)
    for name, module in model.named_modules():
        if isinstance(module, Adapters) or ".adapters." in f".{name}.":
            continue
        module.register_forward_pre_hook(partial(recorder.begin, name), with_kwargs=True)
        module.register_forward_hook(recorder.end)
    model.train()
    with recorder:
        returned = call(model, example)
        trace.outputs = trace.storages(output(returned) if output else returned)
    return trace


class _Recorder(TorchDispatchMode):
    """Writes a trace while it is active."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.trace = trace
        self.open: list[int] = [-1]
        self.events = 0

    def _now(self) -> Moment:
        self.events += 1
        return Moment(len(self.trace.ops), self.events)

    def begin(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a module is called."""
        begun = Call(name, self.open[-1], self._now(), args, dict(kwargs), _NEVER)
        self.open.append(len(self.trace.calls))
        self.trace.calls.append(begun)

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that the innermost call has ended."""
        ended = self.trace.calls[self.open.pop()]
        ended.end, ended.output = self._now(), output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func._overloadpacket.__name__
        reads: frozenset[int] = frozenset()
        if name not in _SHAPE_ALONE:
            reads = self.trace.storages([args, kwargs])
        changes = self.trace.storages(written(func, args, kwargs))
        writes = self.trace.storages(output) | changes
        is_random = _draws(func, args, kwargs)
        self.trace.ops.append(Op(reads, writes, changes, self.open[-1], is_random, name in _ASKS))
        return output


def _draws(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation draws random numbers; attention without dropout does not."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    for i, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout_p", "p", "dropout"):
            rate = args[i] if i < len(args) else kwargs.get(argument.name, argument.default_value)
            return bool(rate != 0)
    return True
