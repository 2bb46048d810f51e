"""Which trainable tensors can reach a model's output? Asked on fake tensors, so nothing is computed.

- In training a tensor must get a gradient.
- In inference there are no gradients, so values are followed through every operation, from its inputs to its
  outputs. A path that exists only in training, because inference takes a fused kernel, does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .copies import on_fakes, run, tensors_in, trainable, undisturbed

BYPASSED = "without gradients (torch.no_grad) the model takes a path that does not use it"
_CUT_OFF = "its gradient is cut off on the way (detach, no_grad, or a step in integers)"
_REENTRANT = (
    "reentrant checkpointing gives no gradient to what it runs on frozen inputs; use "
    "checkpoint(…, use_reentrant=False), or let its input require a gradient"
)
# Part of the warning that torch gives for reentrant checkpointing.
_REENTRANT_WARNING = "None of the inputs have requires_grad=True"

Modes = tuple[str, ...]
Missing = dict[str, Modes]


@dataclass(frozen=True)
class WithoutEffect:
    """A trainable tensor without effect on the output in train mode, in eval mode, or in both, and why."""

    name: str
    modes: Modes
    reason: str

    def __str__(self) -> str:
        return f"{self.name} in {' and '.join(self.modes)} mode: {self.reason}"


@dataclass
class Connections:
    """The result of `connected`. Print it.

    Attributes:
        trainable: Names of all trainable tensors.
        without_effect: Those that do not reach the output in train or in eval mode.
    """

    trainable: list[str]
    without_effect: list[WithoutEffect] = field(default_factory=list)

    def __str__(self) -> str:
        reaching = len(self.trainable) - len(self.without_effect)
        first = f"{reaching} of {len(self.trainable)} trainable tensors are connected"
        return "\n  ".join([first, *map(str, self.without_effect)])


def connected(model: nn.Module, example_input: Any) -> Connections:
    """Find the trainable tensors that are not connected to the output in train or in eval mode.

    Works on the meta device too. A connected tensor may still have no effect, for instance because a weight
    behind it is zero: `medpeft.check` finds that on real values.

    Args:
        model: An adapted model (or any other); it is not touched.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs; values do not count.

    Raises:
        MedpeftError: the model cannot run on fake tensors, because it asks for values, for instance.
    """
    with undisturbed() as warned:
        with_gradient = on_fakes(_with_gradient, model, example_input)
        in_inference = on_fakes(_in_inference, model, example_input)
    names = list(trainable(model))
    missing: Missing = {}
    for name in names:
        if name not in with_gradient:
            missing[name] = ("train",)
        if name not in in_inference:
            missing[name] = (*missing.get(name, ()), "eval")
    if not missing:
        return Connections(names)
    reentrant = any(_REENTRANT_WARNING in text for text in warned)
    with undisturbed():
        explain = partial(_explained, missing=missing, reentrant=reentrant)
        return Connections(names, on_fakes(explain, model, example_input))


def _with_gradient(model: nn.Module, example: Any) -> set[str]:
    """Names of the trainable tensors that get a gradient in train mode."""
    model.train()
    sums = [out.abs().sum().double() for out in run(model, example) if out.requires_grad]
    if sums:
        # Not autograd.grad: reentrant checkpointing refuses that.
        torch.stack(sums).sum().backward()
    return {name for name, parameter in trainable(model).items() if parameter.grad is not None}


def _in_inference(model: nn.Module, example: Any) -> set[str]:
    """Names of the trainable tensors whose values flow into the output in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return _flowing(model, example)


def _flowing(model: nn.Module, example: Any) -> set[str]:
    """Names of the trainable tensors whose values flow into the output."""
    flow = Dataflow(trainable(model))
    with flow:
        return flow.sources_of(run(model, example))


class Dataflow(TorchDispatchMode):
    """Follows values through the operations that run inside it, from sources to all that they flow into."""

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._names: list[str] = []
        # By storage, because views share it. Each is kept, so that no address is used twice.
        self._storages: dict[int, Any] = {}
        # Bit i says that the i-th source flows into a storage.
        self._bits: dict[int, int] = {}
        for name, source in sources.items():
            self.watch(name, source)

    def watch(self, name: str, source: Tensor) -> None:
        """Follow one more source."""
        self._add(source, 1 << len(self._names))
        self._names.append(name)

    def sources_of(self, values: Any) -> set[str]:
        """Names of the sources that flow into any tensor of a nested value."""
        bits = self._bits_of(values)
        return {name for i, name in enumerate(self._names) if bits >> i & 1}

    def _add(self, tensor: Tensor, bits: int) -> None:
        storage = _storage(tensor)
        self._storages[storage._cdata] = storage
        self._bits[storage._cdata] = self._bits.get(storage._cdata, 0) | bits

    def _bits_of(self, values: Any) -> int:
        bits = 0
        for tensor in tensors_in(values):
            bits |= self._bits.get(_storage(tensor)._cdata, 0)
        return bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        bits = self._bits_of([args, kwargs])
        if bits:
            for tensor in tensors_in([output, written(func, args, kwargs)]):
                self._add(tensor, bits)
        return output


def _storage(tensor: Tensor) -> Any:
    """Memory of a tensor: its storage, or the tensor itself if it is sparse and has none."""
    return tensor.untyped_storage() if tensor.layout == torch.strided else tensor


def written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """List the arguments that an operation writes into."""
    written = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[i] if i < len(args) else kwargs.get(argument.name))
    return written


class _Watch:
    """Notes which of the tensors' layers run in a forward."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.called: set[str] = set()
        for layer in set(map(layer_of, names)):
            self._add(layer, model.get_submodule(layer))

    def _add(self, name: str, layer: nn.Module) -> None:
        forward = layer.forward

        def note_forward(*args: Any, **kwargs: Any) -> Any:
            self.called.add(name)
            return forward(*args, **kwargs)

        layer.__dict__["forward"] = note_forward
        for parameter in layer.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.requires_grad_(True)  # Then it is followed, too.


def _explained(model: nn.Module, example: Any, missing: Missing, reentrant: bool) -> list[WithoutEffect]:
    """Say what keeps each missing tensor from the output, in the first mode in which it is missing."""
    results = []
    for mode in ("train", "eval"):
        names = [name for name, modes in missing.items() if modes[0] == mode]
        if not names:
            continue
        model.train(mode == "train")
        watch = _Watch(model, names)
        flowing = _flowing(model, example)
        for name in names:
            if name not in flowing:
                reason = _reason_unused(name, watch, flowing)
            elif mode == "eval":
                reason = BYPASSED
            else:
                reason = _REENTRANT if reentrant else f"its values reach the output, but {_CUT_OFF}"
            results.append(WithoutEffect(name, missing[name], reason))
    return results


def layer_of(tensor: str) -> str:
    """Name of the layer that a tensor belongs to or, if it is an adapter's, acts on."""
    layer, is_adapter, _ = f".{tensor}".partition(".adapters.")
    if not is_adapter:
        layer = layer.rpartition(".")[0]
    return layer[1:]


def _reason_unused(name: str, watch: _Watch, flowing: set[str]) -> str:
    """Say why a tensor is not used; `flowing`: names of the tensors that are."""
    owner = layer_of(name)
    layer = owner or "the model"
    is_read = any(other.rpartition(".")[0] == owner for other in flowing)
    if owner in watch.called and is_read:
        return f"{layer} runs, but makes no use of it for this input; exclude it"
    if owner in watch.called:
        return f"{layer} runs, but its output is not used for the output of the model"
    if is_read:
        hint = "exclude it, or call the layer itself"
        return f"the weight of {layer} is read, but the layer is never called; {hint}"
    return f"{layer} never runs: its branch is not used for this input; exclude it"
