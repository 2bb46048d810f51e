"""Peak memory and operations of a training step, counted on fake tensors while they come and go."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks.copies import on_fakes, run, tensors_in, trainable, undisturbed
from .costs import Flops, storage_id


@dataclass(frozen=True)
class Step:
    """Forecast of a training step.

    Attributes:
        peak_bytes: Most bytes of tensors at one time: the model, the input, what is kept for backward,
            gradients, the optimizer's state and what it computes with.
        training_flops: Operations of forward and backward.
        trained_share: Share of the forward's operations from the first trainable tensor on.
    """

    peak_bytes: int
    training_flops: int
    trained_share: float


def forecast(model: nn.Module, example_input: Any, optimizer_states: int = 2) -> Step:
    """Forecast a training step of a model as it is, in train mode.

    Args:
        model: Any model, on any device; it is not touched.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs; values do not count.
        optimizer_states: Tensors that the optimizer keeps for each parameter: 2 for Adam, 0 for plain SGD.

    Raises:
        MedpeftError: the model does not run on fake tensors.
    """

    def step(fake_model: nn.Module, fake_input: Any) -> Step:
        return _step(fake_model, fake_input, optimizer_states)

    with undisturbed():
        return on_fakes(step, model, example_input)


def _step(model: nn.Module, example: Any, optimizer_states: int) -> Step:
    model.train()
    trained = list(trainable(model).values())
    meter = Meter(trained)
    held = [*model.parameters(), *model.buffers(), *tensors_in(example)]
    for tensor in held:
        meter.add(tensor)
    # No tensors, as they are there before the step and after it.
    meter.live += optimizer_states * sum(parameter.nbytes for parameter in trained)
    meter.peak = meter.live
    with meter:
        outputs = [output for output in run(model, example) if output.requires_grad]
        forward_flops = meter.total
        if outputs:
            torch.autograd.backward(outputs, list(map(torch.ones_like, outputs)))
        del outputs
    # An optimizer goes from parameter to parameter: the denominator, and its root before it is divided.
    in_optimizer = meter.live + 2 * max((parameter.nbytes for parameter in trained), default=0)
    before = forward_flops if meter.before_trained is None else meter.before_trained
    trained_share = 1.0 - before / max(forward_flops, 1)
    return Step(max(meter.peak, in_optimizer), meter.total, trained_share)


class Meter(Flops):
    """Counts operations, and the bytes of all tensors that are alive.

    Attributes:
        live: Bytes alive now.
        peak: Most bytes alive at one time.
        before_trained: Operations before the first one that reads a trainable tensor; None if none did.
    """

    def __init__(self, trained: list[nn.Parameter]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.before_trained: int | None = None
        self._trained = set(map(storage_id, trained))
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it is freed; views of one tensor share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._references:
            return

        def freed(_: Any) -> None:
            del self._references[key]
            self.live -= size

        self._references[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.before_trained is None:
            read = map(storage_id, tensors_in([args, kwargs or {}]))
            if not self._trained.isdisjoint(read):
                self.before_trained = self.total
        output = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in tensors_in(output):
            self.add(tensor)
        return output
