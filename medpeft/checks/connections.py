"""Which trainable tensors can reach a model's output, found on fake tensors: nothing is computed, no weight is needed.

In training a tensor must get a gradient. In inference there is no gradient to ask, so every operation's inputs are followed
into its outputs: a path that only exists in training, such as one around a fused kernel, does not pass for one that serves.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .copies import on_fakes, run, undisturbed


@dataclass(frozen=True)
class Silent:
    """A trainable tensor that does not reach the output.

    Attributes:
        name: Its name in the model.
        modes: "train", "eval", or both.
        reason: What is in its way.
    """

    name: str
    modes: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.name} in {' and '.join(self.modes)} mode: {self.reason}"


@dataclass
class Connections:
    """What `connected` found. Print it.

    Attributes:
        trainable: Names of all trainable tensors.
        silent: Those that do not reach the output in train or in eval mode.
    """

    trainable: list[str]
    silent: list[Silent] = field(default_factory=list)

    def __str__(self) -> str:
        found = f"{len(self.trainable) - len(self.silent)} of {len(self.trainable)} trainable tensors are connected"
        return "\n  ".join([found, *map(str, self.silent)])


def connected(model: nn.Module, example_input: Any) -> Connections:
    """Which trainable tensors are connected to the output in train and in eval mode, without computing anything.

    Works on the meta device too. A connected tensor may still not act, because a weight behind it is zero, for instance:
    `medpeft.check` finds that on real values.

    Args:
        model: An adapted model (or any other); it is not touched.
        example_input: An input, a tuple of inputs, or a mapping of keyword inputs; only shapes and dtypes matter.

    Raises:
        MedpeftError: the model cannot run on fake tensors, because its control flow asks for values, for instance.
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    with undisturbed() as heard:
        by_gradient = on_fakes(_with_gradient, model, example_input)
        by_dataflow = on_fakes(_reaching, model, example_input)
    found = Connections(trainable)
    modes = {n: _missing(n, train=by_gradient, eval=by_dataflow) for n in trainable}
    missing = {name: absent for name, absent in modes.items() if absent}
    if missing:
        with undisturbed():
            reasons = on_fakes(lambda m, x: _reasons(m, x, missing, heard), model, example_input)
        found.silent = [Silent(name, absent, reasons[name]) for name, absent in missing.items()]
    return found


def _missing(name: str, **found: set[str]) -> tuple[str, ...]:
    return tuple(mode for mode, names in found.items() if name not in names)


def _with_gradient(model: nn.Module, example: Any) -> set[str]:
    """Names of the trainable tensors that get a gradient in train mode."""
    model.train()
    outputs = [out for out in run(model, example) if out.requires_grad]
    if outputs:
        # Not autograd.grad: reentrant checkpointing refuses that.
        torch.stack([out.abs().sum().double() for out in outputs]).sum().backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def _reaching(model: nn.Module, example: Any) -> set[str]:
    """Names of the trainable tensors from which values flow into the output in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return _flow(model, example)


def _flow(model: nn.Module, example: Any) -> set[str]:
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with Dataflow(names.values()) as flow:
        bits = flow.of(run(model, example))
    return {name for i, name in enumerate(names) if bits >> i & 1}


class Dataflow(TorchDispatchMode):
    """Follows which of the given tensors flow into which other ones: bit i of `of(tensor)` stands for the i-th."""

    def __init__(self, sources: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        # By storage, so that views and what is written in place are followed; kept, so that no address is used twice.
        self._storages: dict[int, Any] = {}
        self._bits: dict[int, int] = {}
        for i, source in enumerate(sources):
            self._add(source, 1 << i)

    def _add(self, tensor: Tensor, bits: int) -> None:
        storage = tensor.untyped_storage()
        self._storages[storage._cdata] = storage
        self._bits[storage._cdata] = self._bits.get(storage._cdata, 0) | bits

    def of(self, values: Any) -> int:
        """Bits of the sources that flow into any tensor of a nested value."""
        bits = 0
        for tensor in _leaves(values):
            bits |= self._bits.get(tensor.untyped_storage()._cdata, 0)
        return bits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        bits = self.of([args, kwargs])
        if bits:
            for tensor in _leaves([output, _written(func, args, kwargs or {})]):
                self._add(tensor, bits)
        return output


def _leaves(values: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Any]:
    """Arguments that an operation writes into."""
    schema = enumerate(func._schema.arguments)
    written = [(i, a.name) for i, a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in written]


@dataclass
class _Use:
    """What happened to a layer in a forward."""

    called: bool = False
    forwarded: bool = False
    read: bool = False


def _reasons(model: nn.Module, example: Any, missing: dict[str, tuple[str, ...]], heard: list[str]) -> dict[str, str]:
    """What keeps each missing tensor from the output."""
    owners = {name: name.partition(".adapters.")[0] if ".adapters." in name else name.rpartition(".")[0] for name in missing}
    found: dict[str, str] = {}
    for training in (False, True):
        mode = "train" if training else "eval"
        names = [name for name in missing if mode in missing[name]]
        if not names:
            continue
        model.train(training)
        uses = _watched(model, {owners[name] for name in names})
        flows = _flow(model, example)
        for name in names:
            uses[owners[name]].read = _own_reached(owners[name], flows)
            reentrant = any("None of the inputs have requires_grad=True" in text for text in heard)
            found[name] = _reason(name, owners[name], uses[owners[name]], name in flows, reentrant)
    return found


def _watched(model: nn.Module, layers: set[str]) -> dict[str, _Use]:
    """Note calls of these layers, and let their frozen tensors be followed as if they trained."""
    uses = {name: _Use() for name in layers}
    for name, use in uses.items():
        layer = model.get_submodule(name)

        def note_call(module: nn.Module, args: Any, use: _Use = use) -> None:
            use.called = True

        def forward(*args: Any, _forward: Any = layer.forward, _use: _Use = use, **kwargs: Any) -> Any:
            _use.forwarded = True
            return _forward(*args, **kwargs)

        layer.register_forward_pre_hook(note_call)
        layer.__dict__["forward"] = forward
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(True)
    return uses


def _own_reached(owner: str, flows: set[str]) -> bool:
    """Whether an own tensor of a layer (not one of its adapters') reaches the output."""
    return any(name.rpartition(".")[0] == owner for name in flows)


def _reason(name: str, owner: str, use: _Use, flows: bool, reentrant: bool) -> str:
    layer = owner or "the model"
    if flows and reentrant:
        return (
            "reentrant checkpointing gives no gradient to what it runs on frozen inputs; use "
            "checkpoint(…, use_reentrant=False), or let its input require a gradient"
        )
    if flows:
        return "its values reach the output, but its gradient is cut off on the way (detach, no_grad, or a step in integers)"
    if use.forwarded and not use.called:
        return f"{layer}.forward is called directly, which passes its hooks by; call the layer itself, {layer}(x)"
    if use.read and not use.called:
        return f"the weight of {layer} is read, but the layer is never called; exclude it, or call the layer itself"
    if not use.called:
        return f"{layer} never runs: its branch is not used for this input; exclude it"
    if use.read:
        return f"{layer} runs, but makes no use of it for this input; exclude it"
    return f"{layer} runs, but its output is not used for the output of the model"
