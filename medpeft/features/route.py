"""Finds the route of a model: the place, and what need not run again. Every candidate is tried out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.connections import Dataflow
from ..checks.copies import copied, mapped, on_fakes, tensors_in, undisturbed
from ..errors import MedpeftError, listed, require
from .blank import described, sizes
from .place import Cut, Flow, Place, cuts
from .rest import Route, run_from
from .trace import Trace, traced

_MOST = 0.9
"""Share of the frozen layers that must lie before a place if its smaller features speak for it."""

_TRIALS = 12
"""Candidates that are tried out at most."""


def find_route(model: nn.Module, example: Any, output: Callable[[Any], Any] | None = None) -> Route:
    """Find the last place before the first trainable tensor through which everything flows.

    Args:
        model: The model.
        example: Its input, a tuple or a mapping of inputs.
        output: Takes out of what the model returns what matters; None for all of it.

    Raises:
        MedpeftError: there is none; the message says what flows around, or what is not the same every time.
    """
    images = images_of(example)
    one_more = mapped(example, lambda tensor: _longer(tensor, images))
    trace = partial(traced, output=output)
    with undisturbed():
        flow = Flow.of(_on_copy(trace, model, example))
        survey = Survey(model, flow, _on_copy(trace, model, one_more), (example, one_more), output)
        return survey.route()


def images_of(example: Any) -> int:
    """Number of images in an example: the length of its first tensor."""
    for tensor in tensors_in(example):
        if tensor.ndim > 0 and len(tensor) > 0:
            return len(tensor)
    raise MedpeftError("example_input has no tensor in it: pass a batch of images.")


def _longer(tensor: Tensor, images: int) -> Tensor:
    """Lengthen a tensor of a batch by one image."""
    if tensor.ndim == 0 or len(tensor) != images:
        return tensor
    return torch.cat([tensor, tensor[:1]])


def _on_copy(step: Callable[[nn.Module, Any], Any], model: nn.Module, example: Any) -> Any:
    """Run a step on a copy without values; or, if the model asks for values, on one that has some."""
    try:
        return on_fakes(step, model, example)
    except MedpeftError:
        return step(copied(model, share_frozen=True), example)


class Survey:
    """Two traces of a model, one of them with one image more, and the search."""

    def __init__(
        self,
        model: nn.Module,
        flow: Flow,
        second: Trace,
        examples: tuple[Any, Any],
        output: Callable[[Any], Any] | None,
    ) -> None:
        self.model, self.flow, self.second, self.examples = model, flow, second, examples
        self.output = output
        self.images = (images_of(examples[0]), images_of(examples[1]))
        self.trace = flow.trace
        self.kind = type(model).__name__
        names = [call.name for call in self.trace.calls]
        require(
            names == [call.name for call in second.calls],
            f"{self.kind} runs other modules for {self.images[1]} images than for {self.images[0]}.",
        )

    def route(self) -> Route:
        """Return the route through the last place that is one."""
        first = self.flow.first
        require(first is not None, f"{self.kind} has no trainable tensor that meets its input: call apply.")
        assert first is not None
        layers = self.flow.layers[first]
        require(
            layers > 0,
            f"{self.kind} has no frozen layer before {self.flow.where(first)!r}, which trains: there is "
            f"nothing to compute once. Train later layers alone.",
        )
        around: dict[str, None] = {}
        candidates = self._candidates(first, layers)
        for cut in candidates[:_TRIALS]:
            if self._is_random(cut, candidates):
                continue
            try:
                route = self._route_at(cut)
            except MedpeftError as reason:
                around[str(reason)] = None
                continue
            ways = self._ways_around(route)
            if not ways:
                return route
            around.update(dict.fromkeys(ways))
        raise MedpeftError(self._no_place(first, list(around)))

    def _candidates(self, first: int, layers: int) -> list[Cut]:
        """List the cuts to try, the latest first.

        What enters a block in which the first trained layer lies goes before it, if it is less than half as
        large: a block may widen its input at once.
        """
        latest_first = [cut for cut in cuts(self.flow) if 2 * cut.layers >= layers]
        blocks = [self.trace.calls[call].name for call in self.trace.around(self.trace.ops[first].call)]

        def enters(cut: Cut) -> bool:
            return cut.place.side == "input" and cut.place.module in blocks

        def is_smaller(cut: Cut) -> bool:
            return enters(cut) and cut.layers >= _MOST * layers and 2 * cut.size < latest_first[0].size

        latest_first.sort(key=lambda cut: (-cut.moment.ops, not enters(cut)))
        return [*filter(is_smaller, latest_first), *latest_first]

    def _is_random(self, cut: Cut, candidates: list[Cut]) -> bool:
        """Whether random numbers are drawn before a cut, while an earlier one is after the same layers.

        Raises:
            MedpeftError: they are drawn, and going back before them would leave layers out.
        """
        names = self.flow.random_before(cut.moment.ops)
        if not names:
            return False
        for earlier in candidates:
            if earlier.layers == cut.layers and not self.flow.random_before(earlier.moment.ops):
                return True
        raise MedpeftError(
            f"What {self.kind} computes before {cut.place} is not the same every time: random numbers are "
            f"drawn in train mode in {listed(names)} (dropout, stochastic depth). Build the model with these "
            f"rates at 0, at least before the first trainable tensor."
        )

    def _route_at(self, cut: Cut) -> Route:
        """Describe the route through a cut.

        Raises:
            MedpeftError: its features do not come one for each image, or what is left out decides something.
        """
        twin = self._twin(cut.place)
        changed = self.trace.changed(cut.moment.ops)
        features = described(cut.tensor, twin, self.images, lambda tensor: self._stores(tensor, changed))
        require(features.batch_axis is not None, f"{cut.place} has not one entry for each image")
        left_out = self._left_out(cut)
        skipped = {}
        for name, positions in left_out.items():
            skipped[name] = self._output(positions[0], cut)
        inside = {position for positions in left_out.values() for position in positions}
        for op in self.trace.ops[: cut.moment.ops]:
            asks = op.asks and not op.reads.isdisjoint(self.flow.from_input)
            if asks and inside.isdisjoint(self.trace.around(op.call)):
                raise MedpeftError("the model decides by values that it computes from its input")
        if cut.place.side == "output":
            require(cut.place.module in skipped, f"{cut.place} cannot be given back in its place")
        first, second = self.examples
        example = described(first, second, self.images, lambda tensor: True)
        return Route(cut.place, features, skipped, example, self._tensors(cut), self.output)

    def _tensors(self, cut: Cut) -> tuple[str, ...]:
        """Names of the parameters and buffers that what is computed before a cut depends on."""
        read: set[int] = set()
        for time in range(cut.moment.ops):
            if self.flow.needed[time]:
                read |= self.trace.ops[time].reads
        return tuple(name for name, storage in self.trace.names.items() if storage in read)

    def _stores(self, tensor: Tensor, storages: set[int]) -> bool:
        return self.trace.storage(tensor) in storages

    def _twin(self, place: Place) -> Any:
        """What passes the place in the trace with one image more."""
        for call in self.second.calls:
            if call.name == place.module:
                if place.side == "output":
                    assert isinstance(place.key, int)
                    return list(tensors_in(call.output))[place.key]
                return call.kwargs[place.key] if isinstance(place.key, str) else call.args[place.key]
        raise MedpeftError(f"{place} is not there for another number of images")

    def _left_out(self, cut: Cut) -> dict[str, list[int]]:
        """Calls that need not run again, by the name of their module: the outermost ones that end before."""
        calls = self.trace.calls
        have_to_run = self.flow.constants_before(cut.moment.ops)
        counts = Counter(call.name for call in calls)
        ended: dict[str, list[int]] = {}
        for position, call in enumerate(calls):
            if call.end.events <= cut.moment.events and position not in have_to_run:
                ended.setdefault(call.name, []).append(position)
        for name, positions in list(ended.items()):
            if len(positions) < counts[name] or not self._is_described(positions, cut):
                del ended[name]
        inside = {position for positions in ended.values() for position in positions}

        def is_covered(position: int) -> bool:
            return not inside.isdisjoint(self.trace.around(calls[position].parent))

        for name, positions in list(ended.items()):
            if all(map(is_covered, positions)):
                del ended[name]
        return ended

    def _is_described(self, positions: list[int], cut: Cut) -> bool:
        """Whether all these calls of a module return the same but for the values, in a form that is known."""
        try:
            outputs = [self._output(position, cut) for position in positions]
        except MedpeftError:
            return False
        return all(output == outputs[0] for output in outputs)

    def _output(self, position: int, cut: Cut) -> Any:
        """Describe what a call returns."""
        first, second = self.trace.calls[position], self.second.calls[position]
        changed = self.trace.changed(first.end.ops, cut.moment.ops)
        return described(
            first.output, second.output, self.images, lambda tensor: self._stores(tensor, changed)
        )

    def _ways_around(self, route: Route) -> list[str]:
        """Say which values reach the output beside the features, when the model goes on from the place."""
        axis = route.features.batch_axis or 0
        shape = sizes(route.features.shape, self.images[0])
        shape.insert(0, shape.pop(axis))
        device = next(tensors_in(self.examples[0])).device
        features = torch.zeros(shape, dtype=route.features.dtype, device=device)

        def trial(model: nn.Module, features: Tensor) -> set[str]:
            model.train()
            flow = Dataflow({"features": features})
            with torch.no_grad(), flow:
                return flow.sources_of(run_from(model, route, features, flow.watch))

        reaching = _on_copy(trial, self.model, features)
        if "features" not in reaching:
            return [f"{route.place} itself does not reach the output"]
        return list(map(_named, sorted(reaching - {"features"})))

    def _no_place(self, first: int, around: list[str]) -> str:
        """Say what flows around the first module that trains."""
        where = self.flow.where(first)
        if not around:
            around = self._passing_by(first)
        return (
            f"{self.kind} cannot go on from one place before {where!r}, the first that trains: "
            f"{', '.join(around[:5])} flows around it. Train on images; or train layers alone that come "
            f"after all such ways."
        )

    def _passing_by(self, first: int) -> list[str]:
        """Origins of the values that pass beside the input of the first module that trains."""
        best: list[str] = []
        for position in self.trace.around(self.trace.ops[first].call)[:-1]:
            call = self.trace.calls[position]
            beside = self.flow.passing(call.begin.ops) - self.trace.storages([call.args, call.kwargs])
            origins = {self.flow.origin(storage, call.begin.ops) for storage in beside}
            if origins and (not best or len(origins) <= len(best)):
                best = sorted(origins)
        return best or ["what the model's own forward makes"]


def _named(module: str) -> str:
    """Name what is left out: a module's output, or with "" the input of the model."""
    if module:
        return f"what {module!r} makes"
    return "the model's input"
