"""The place in a model before which nothing trains, and through which one tensor alone carries the image.

It is read off a trace: of all values made before a moment, those still needed after it are its live ones. A
moment at which one live value alone depends on the model's input is a cut. The place is the last cut before
the first value that depends both on the input and on a trainable tensor.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from ..checks.copies import tensors_in
from .trace import Moment, Trace


@dataclass(frozen=True)
class Place:
    """Where features are taken and put in again.

    Attributes:
        module: Name of a module.
        side: Whether they are one of its inputs or of its outputs.
        key: Which one: position or name of an input, position among the tensors of the output.
    """

    module: str
    side: Literal["input", "output"]
    key: int | str

    def __str__(self) -> str:
        return f"the {self.side} of {self.module!r}"


@dataclass
class Cut:
    """A place that may do.

    Attributes:
        place: The place.
        moment: When it is passed.
        layers: Operations on frozen weights among them.
        tensor: The value that passes it.
    """

    place: Place
    moment: Moment
    layers: int
    tensor: Tensor

    @property
    def size(self) -> int:
        """Number of elements of that value."""
        return self.tensor.numel()


@dataclass
class Flow:
    """What flows where in a trace.

    Attributes:
        trace: The trace.
        from_input: Storages of values that depend on the model's input.
        first: Number of operations before the first value that depends on the input and on what trains;
            None if there is none.
        needed: Whether the output depends on what each operation made.
        live: The live storages of some moments, by number of operations.
        layers: How many operations with frozen weights ran before each operation, and before the end.
    """

    trace: Trace
    from_input: set[int] = field(default_factory=set)
    first: int | None = None
    needed: list[bool] = field(default_factory=list)
    live: dict[int, frozenset[int]] = field(default_factory=dict)
    layers: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, trace: Trace) -> Flow:
        """Follow all values of a trace, backward and forward."""
        flow = cls(trace)
        flow._go_backward()
        flow._go_forward()
        return flow

    def _go_backward(self) -> None:
        moments = {call.begin.ops for call in self.trace.calls} | {call.end.ops for call in self.trace.calls}
        live = self.trace.outputs
        self.needed = [False] * len(self.trace.ops)
        for time in range(len(self.trace.ops), -1, -1):
            if time < len(self.trace.ops):
                op = self.trace.ops[time]
                self.needed[time] = bool(op.writes & live)
                if self.needed[time]:
                    live = (live - op.writes) | op.reads
            if time in moments:
                self.live[time] = live

    def _go_forward(self) -> None:
        self.from_input = set(self.trace.inputs)
        from_trained = set(self.trace.trainable)
        for time, op in enumerate(self.trace.ops):
            if not op.reads.isdisjoint(self.from_input):
                self.from_input |= op.writes - self.trace.parameters
            if not op.reads.isdisjoint(from_trained):
                from_trained |= op.writes
            meets = not op.writes.isdisjoint(from_trained) and not op.writes.isdisjoint(self.from_input)
            if meets and self.needed[time] and self.first is None:
                self.first = time
            self.layers.append(self.layers[-1] + self._is_layer(time))

    def passing(self, time: int) -> set[int]:
        """Storages that carry what depends on the input past a moment."""
        return (set(self.live[time]) & self.from_input) - self.trace.parameters

    def _is_layer(self, time: int) -> bool:
        """Whether an operation applies weights to what depends on the input."""
        op = self.trace.ops[time]
        if not self.needed[time] or op.reads.isdisjoint(self.from_input):
            return False
        return not op.reads.isdisjoint(self.trace.parameters)

    def where(self, time: int) -> str:
        """Name of the innermost module that ran an operation."""
        call = self.trace.ops[time].call
        return self.trace.calls[call].name if call >= 0 else ""

    def origin(self, storage: int, before: int) -> str:
        """Name of the module that made a value, of the model's input without one."""
        for time in range(before - 1, -1, -1):
            if storage in self.trace.ops[time].writes:
                name = self.where(time)
                return f"what {name!r} makes" if name else "what the model's own forward makes"
        return "the model's input"

    def random_before(self, time: int) -> list[str]:
        """Names of the modules that draw random numbers before a moment and pass them on."""
        names: dict[str, None] = {}
        for earlier in range(time):
            if self.trace.ops[earlier].is_random and self.needed[earlier]:
                names[self.where(earlier) or "the model's own forward"] = None
        return list(names)

    def constants_before(self, time: int) -> set[int]:
        """Positions of the calls that make, before a moment, what does not depend on the input but is needed.

        They have to run again: their values cannot be left out.
        """
        wanted = set(self.live[time]) - self.from_input - self.trace.parameters - self.trace.inputs
        calls: set[int] = set()
        for earlier in range(time - 1, -1, -1):
            op = self.trace.ops[earlier]
            if not op.writes.isdisjoint(wanted):
                wanted = (wanted - op.writes) | (op.reads - self.trace.parameters)
                calls.update(self.trace.around(op.call))
        return calls


def cuts(flow: Flow) -> list[Cut]:
    """List the cuts before the first trained value, the latest first, modules around others before those."""
    calls_of = Counter(call.name for call in flow.trace.calls)
    found: list[tuple[tuple[int, int, int], Cut]] = []
    for position, call in enumerate(flow.trace.calls):
        if position == 0 or calls_of[call.name] > 1:
            continue
        inputs: dict[int | str, Any] = dict(enumerate(call.args))
        inputs.update(call.kwargs)
        cut = _cut(flow, call.name, "input", call.begin, inputs)
        if cut is not None:
            found.append(((-call.begin.ops, 0, position), cut))
        outputs: dict[int | str, Any] = dict(enumerate(tensors_in(call.output)))
        cut = _cut(flow, call.name, "output", call.end, outputs)
        if cut is not None:
            found.append(((-call.end.ops, 1, position), cut))
    return [cut for _, cut in sorted(found, key=lambda item: item[0])]


def _cut(
    flow: Flow, module: str, side: Literal["input", "output"], moment: Moment, values: dict[int | str, Any]
) -> Cut | None:
    """Return the cut at a side of a module, None if other values pass that moment too."""
    assert flow.first is not None
    if moment.ops > flow.first:
        return None
    passing = flow.passing(moment.ops)
    if len(passing) != 1:
        return None
    for key, value in values.items():
        if isinstance(value, Tensor) and flow.trace.storage(value) in passing:
            return Cut(Place(module, side, key), moment, flow.layers[moment.ops], value)
    return None
